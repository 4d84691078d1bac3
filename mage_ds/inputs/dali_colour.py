"""SimCLR's changes of colour by DALI's operators, one graph on the CPU and on the GPU.

The operations are torchvision's (adjust_brightness, _contrast, _saturation, _hue, rgb_to_grayscale, gaussian_blur) in
float32, rounded once in the end. DALI's own brightness_contrast, saturation and hue are others: their contrast turns
about middle grey instead of the picture's mean, and their hue turns a plane of YIQ.

Planes are kept apart, so that only numbers of a picture are spread over pixels: DALI spreads planes slowly.
"""

from __future__ import annotations


def changed(images, colour, cuda: bool):
    """Data node of uint8 (3, H, W) pictures -> the same with the changes that come from outside as `colours`.

    colour: the recipe's section: what it never changes costs nothing.
    """
    from nvidia.dali import fn, types

    colours = fn.external_source(name="colours", dtype=types.FLOAT, ndim=1)
    numbers = colours.gpu() if cuda else colours
    planes = [fn.cast(images[c : c + 1], dtype=types.FLOAT) for c in range(3)]
    if colour.brightness:
        planes = [_clamp(plane * numbers[0]) for plane in planes]
    if colour.contrast:
        mean = fn.reductions.mean(_grey(planes))
        planes = [_clamp(plane) for plane in _mixed(planes, mean, numbers[1])]
    if colour.saturation:
        planes = [_clamp(plane) for plane in _mixed(planes, _grey(planes), numbers[2])]
    if colour.hue:
        planes = _turned(planes, numbers[3])
    if colour.grey:
        planes = _mixed(planes, _grey(planes), numbers[4])
    images = fn.cat(*planes, axis=0)
    if colour.blur:  # its arguments are the host's, wherever the pictures are
        window = fn.cast(colours[6:7], dtype=types.INT32)
        images = fn.gaussian_blur(images, sigma=colours[5:6], window_size=window)
    return fn.cast(images, dtype=types.UINT8)  # rounds


def _clamp(plane):
    from nvidia.dali import math

    return math.clamp(plane, 0.0, 255.0)


def _mixed(planes, other, share):
    """Of each plane a share, of the other one, or of a number, the rest."""
    rest = other * (1.0 - share)
    return [plane * share + rest for plane in planes]


def _grey(planes):
    red, green, blue = planes
    return red * 0.2989 + green * 0.587 + blue * 0.114


def _turned(planes, turn):
    """Hue turned by `turn` circles in HSV, whose value and chroma stay.

    Of six parts of the circle, `hue` says which: 0 red, 2 green, 4 blue; each channel is the largest one less the
    chroma times how far the hue is from it, as in f(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + hue) mod 6.
    """
    from nvidia.dali import fn, math, types

    red, green, blue = planes
    top = math.max(math.max(red, green), blue)
    chroma = top - math.min(math.min(red, green), blue)
    part = 1.0 / math.max(chroma, 1e-6)  # where it is 0, any hue is right
    most_red = fn.cast(top == red, dtype=types.FLOAT)
    most_green = fn.cast(top == green, dtype=types.FLOAT) * (1.0 - most_red)
    hue = most_red * (green - blue) * part + most_green * ((blue - red) * part + 2.0)
    hue = hue + (1.0 - most_red - most_green) * ((red - green) * part + 4.0) + turn * 6.0
    turned = []
    for n in (5.0, 3.0, 1.0):
        k = hue + n
        k = k - 6.0 * math.floor(k * (1 / 6.0))
        turned.append(top - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0))
    return turned
