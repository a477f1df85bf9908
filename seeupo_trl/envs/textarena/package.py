"""All that is imported of the optional package `textarena`, and the error if it is missing."""

try:
    import textarena
    from textarena.core import ObservationType
    from textarena.envs.registration import ENV_REGISTRY
    from textarena.wrappers import ActionFormattingWrapper
except ImportError as error:
    raise ImportError(
        "The TextArena environment needs the package textarena:\n"
        "    pip install -c constraints.txt -e '.[textarena]'    (or: pip install textarena==0.7.4)"
    ) from error


__all__ = ["ENV_REGISTRY", "ActionFormattingWrapper", "ObservationType", "textarena"]
