"""The flag `--size` of commands."""

from t2i_jax.core.config import ConfigError

LARGEST = 65536


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WIDTHxHEIGHT". Errors: `ConfigError`."""
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdecimal() and 0 < int(side) <= LARGEST for side in (width, height)):
        raise ConfigError(f"--size {text}: it is WIDTHxHEIGHT in pixels, as 96x64")
    return int(width), int(height)
