"""All that is imported of the optional packages `bfcl-eval` and `mpmath`, and the error if they are missing."""

try:
    import bfcl_eval
    import mpmath
    from bfcl_eval.constants.executable_backend_config import (
        CLASS_FILE_PATH_MAPPING,
        MULTI_TURN_FUNC_DOC_FILE_MAPPING,
        STATELESS_CLASSES,
    )
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker
except ImportError as error:
    raise ImportError(
        "The BFCL environment needs the packages bfcl-eval and mpmath. Install bfcl-eval without its dependencies "
        "(they are about 150 packages and pin numpy 1.26, which breaks `datasets`):\n"
        "    pip install --no-deps bfcl-eval==2026.3.23\n"
        "    pip install mpmath==1.3.0"
    ) from error


__all__ = [
    "CLASS_FILE_PATH_MAPPING",
    "MULTI_TURN_FUNC_DOC_FILE_MAPPING",
    "STATELESS_CLASSES",
    "bfcl_eval",
    "mpmath",
    "multi_turn_checker",
]
