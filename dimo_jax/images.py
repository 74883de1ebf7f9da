"""Pictures on their way to a file."""

import numpy as np

_GAP = 2  # pixels between and around the images
_PAPER = 128  # mid-grey: neither ink nor ground of a digit


def grid(images: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Lays images out row by row, each pixel as a square of `scale` x `scale`, with grey gaps.

    Args:
      images: [N, H, W, C] float in [-1, 1] (values outside are cut), C = 1 (shown as grey) or 3.
      columns: images in a row; the last row may stay short.

    Returns:
      uint8 [height, width, 3].
    """
    images = np.asarray(images, np.float32)
    pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1] + _GAP, pixels.shape[2] + _GAP
    rows = -(-len(pixels) // columns)
    sheet = np.full((rows * height + _GAP, columns * width + _GAP, 3), _PAPER, np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * height + _GAP, number % columns * width + _GAP
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet
