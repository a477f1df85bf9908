"""What is particular to several processes, DeepSpeed and FSDP2, and to resuming exactly."""
