"""An environment whose episodes last as many turns as their task says."""

from seeupo_trl import MultiTurnEnvironment, Observation, StepResult


class CountDown(MultiTurnEnvironment):
    """Talks for as many turns as the task says; pays one point for each response, more for longer ones."""

    def reset(self, turns: int = 2, prompt=None, **task) -> Observation:
        self.left = turns
        return Observation(messages=[{"role": "user", "content": f"w{turns}"}])

    def step(self, message) -> StepResult:
        self.left -= 1
        return StepResult(
            messages=[{"role": "user", "content": "w1"}],
            reward=1 + len(message["content"]) / 100,
            terminated=self.left == 0,
        )
