"""FlexTok image tokenizers (arXiv 2502.13967), and what training them with REPA (arXiv 2410.06940) needs."""


def __getattr__(name):
    if name in ("FlexTok", "FlexTokFromHub"):  # imported on first use: `import flextok` stays cheap
        from . import flextok_wrapper

        return getattr(flextok_wrapper, name)
    raise AttributeError(f"module 'flextok' has no attribute {name!r}")
