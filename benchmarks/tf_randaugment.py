"""RandAugment in a tf.data pipeline, image by image on the host.

For benchmarks/input_pipeline.py, which runs it with a Python that has TensorFlow. The sixteen
operations are the authors', with the same arguments at magnitude 10 (arXiv 1909.13719). Each of
four layers draws one for each image, by one `switch_case` where the authors use sixteen `cond`.
"""

import math

import tensorflow as tf

_GRAY, _LAYERS = 128.0, 4


def randaugment(image):
    """Applies four random operations at magnitude 10 to `image`, uint8 [H, W, 3]."""
    for _ in range(_LAYERS):
        branches = [lambda image=image, f=f: tf.ensure_shape(f(image), image.shape) for f in _ALL]
        drawn = tf.random.uniform([], 0, len(branches), tf.int32)
        image = tf.switch_case(drawn, branches)
    return image


def mix_halves(images):
    """Mixes a batch's first half with its second: MixUp for one part of it, CutMix for the other.

    As the authors' code, without the labels, which cost nothing.
    """
    own, other = tf.split(images, 2)
    count, side = tf.shape(own)[0], images.shape[1]
    weight = tf.random.uniform([count // 2, 1, 1, 1])
    averaged = weight * own[: count // 2] + (1 - weight) * other[: count // 2]
    half = tf.sqrt(tf.random.uniform([count - count // 2, 1])) * side / 2
    y, x = (
        tf.abs(tf.range(side, dtype=tf.float32) - tf.random.uniform(tf.shape(half), 0, float(side)))
        < half
        for _ in range(2)
    )
    pasted = tf.where(
        (y[:, :, None] & x[:, None])[..., None], other[count // 2 :], own[count // 2 :]
    )
    return tf.concat([averaged, pasted], 0)


def _signed(value):
    return tf.where(tf.random.uniform([]) < 0.5, value, -value)


def _warp(image, transform):
    """Maps output (x, y) to input (a x + b y + c, d x + e y + f), for transform a to f."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.concat([tf.cast(transform, tf.float32), [0.0, 0.0]], 0)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=_GRAY,
        interpolation='NEAREST',
        fill_mode='CONSTANT',
    )[0]


def _rotate(image):
    angle = _signed(math.radians(30))
    cos, sin = tf.cos(angle), tf.sin(angle)
    rows, columns = (tf.cast(n - 1, tf.float32) for n in (tf.shape(image)[0], tf.shape(image)[1]))
    x = (columns - (cos * columns - sin * rows)) / 2
    y = (rows - (sin * columns + cos * rows)) / 2
    return _warp(image, tf.stack([cos, -sin, x, sin, cos, y]))


def _shear_x(image):
    return _warp(image, tf.stack([1.0, _signed(0.3), 0.0, 0.0, 1.0, 0.0]))


def _shear_y(image):
    return _warp(image, tf.stack([1.0, 0.0, 0.0, _signed(0.3), 1.0, 0.0]))


def _translate_x(image):
    return _warp(image, tf.stack([1.0, 0.0, _signed(100.0), 0.0, 1.0, 0.0]))


def _translate_y(image):
    return _warp(image, tf.stack([1.0, 0.0, 0.0, 0.0, 1.0, _signed(100.0)]))


def _blend(degenerate, image, factor=1.9):
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    return tf.saturate_cast(degenerate + factor * (image - degenerate), tf.uint8)


def _gray(image):
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def _contrast(image):
    return _blend(tf.reduce_mean(tf.cast(_gray(image), tf.float32)), image)


def _sharpness(image):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13
    blurred = tf.nn.depthwise_conv2d(
        tf.cast(image, tf.float32)[None], tf.tile(kernel, [1, 1, 3, 1]), [1, 1, 1, 1], 'VALID'
    )[0]
    inside = tf.pad(tf.ones_like(blurred), [[1, 1], [1, 1], [0, 0]])
    blurred = tf.pad(blurred, [[1, 1], [1, 1], [0, 0]])
    return _blend(tf.where(inside == 1, blurred, tf.cast(image, tf.float32)), image)


def _autocontrast(image):
    values = tf.cast(image, tf.float32)
    low, high = tf.reduce_min(values, [0, 1]), tf.reduce_max(values, [0, 1])
    stretched = (values - low) * 255 / tf.maximum(high - low, 1)
    return tf.cast(tf.where(high > low, stretched, values), tf.uint8)


def _equalize(image):
    def channel(c):
        values = tf.cast(image[..., c], tf.int32)
        counts = tf.histogram_fixed_width(values, [0, 255], 256)
        last = tf.boolean_mask(counts, counts > 0)[-1]
        step = (tf.reduce_sum(counts) - last) // 255
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
        table = tf.where(step > 0, tf.clip_by_value(table, 0, 255), tf.range(256))
        return tf.cast(tf.gather(table, values), tf.uint8)

    return tf.stack([channel(c) for c in range(3)], -1)


def _cutout(image, half=40):
    rows, columns = tf.shape(image)[0], tf.shape(image)[1]
    y = tf.abs(tf.range(rows) - tf.random.uniform([], 0, rows, tf.int32)) < half
    x = tf.abs(tf.range(columns) - tf.random.uniform([], 0, columns, tf.int32)) < half
    return tf.where((y[:, None] & x)[..., None], tf.cast(_GRAY, tf.uint8), image)


def _solarize_add(image):
    added = tf.clip_by_value(tf.cast(image, tf.int32) + 110, 0, 255)
    return tf.where(image < 128, tf.cast(added, tf.uint8), image)


_ALL = (
    _autocontrast,
    _equalize,
    lambda image: 255 - image,  # Invert
    _rotate,
    lambda image: tf.bitwise.left_shift(tf.bitwise.right_shift(image, 4), 4),  # Posterize
    lambda image: 255 - image,  # Solarize: its threshold of 256 is 0 in uint8
    _solarize_add,
    lambda image: _blend(_gray(image), image),  # Color
    _contrast,
    lambda image: _blend(tf.zeros_like(image), image),  # Brightness
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _cutout,
)
