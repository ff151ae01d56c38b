"""What the pixels of an image become on their way to a network."""

from typing import Any, NamedTuple


class PixelFormat(NamedTuple):
    """Pixels of uint8 with a number of channels.

    Attributes:
        channels: 1 is gray, 3 is RGB, any other number the bands of a multispectral image.
        value_range: the values of integers and floats other than uint8 that become 0 and 255; those
            outside are clipped. None: that of uint16 is all its values, others are refused.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None

    @property
    def is_picture(self) -> bool:
        """Whether an image is read as a viewer shows it, instead of band by band."""
        return self.channels in (1, 3) and self.value_range is None


RGB = PixelFormat()


def is_range(value: Any) -> bool:
    """Returns whether a value is two growing numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(end) in (int, float) and abs(end) < 1e30 for end in value)
        and value[0] < value[1]
    )
