"""Augmentations against NumPy: every view is one of the finite set, every blend the pixel-wise mixture that its label says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wdkd.augment import blend, create_augmentation, cut_box, example_keys, flip, padded_crop
from wdkd.config import AugmentConfig
from wdkd.errors import UsageError

SHAPE = (5, 6, 2)


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compiling takes nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def for_each(function):
    """`function` of a key and more, compiled for many keys."""
    return jax.jit(lambda keys, *rest: jax.vmap(lambda key: function(key, *rest))(keys))


def compiled(*config, **options):
    return jax.jit(create_augmentation(AugmentConfig(*config, **options), SHAPE))


def images(seed, *leading):
    return np.random.default_rng(seed).uniform(size=(*leading, *SHAPE)).astype(np.float32)


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def shifts(image, padding):
    """All (2p + 1)² crops of the zero-padded image, by moving it."""
    height, width, _ = image.shape
    views = []
    for down in range(-padding, padding + 1):
        for right in range(-padding, padding + 1):
            view = np.zeros_like(image)
            rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
            from_rows, from_columns = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
            view[rows, columns] = image[from_rows, from_columns]
            views.append(view)
    return np.array(views)


def members(views, allowed):
    """For each view, which of the allowed ones it equals; there must be exactly one."""
    equal = (np.asarray(views)[:, None] == allowed[None]).all((2, 3, 4))
    assert (equal.sum(1) == 1).all()
    return equal.argmax(1)


# --- moving -------------------------------------------------------------------------------------------------------------


def test_flip_mirrors_half_of_the_time():
    image = images(0)
    found = members(for_each(flip)(keys(0, 400), image), np.array([image, image[:, ::-1]]))
    assert abs(found.mean() - 0.5) < 0.1


@pytest.mark.parametrize("padding", [0, 1, 2, 5])
def test_crop_is_one_of_all_shifts_and_each_as_likely(padding):
    image, draws = images(1), 4000
    allowed = shifts(image, padding)
    assert len(allowed) == (2 * padding + 1) ** 2
    views = for_each(lambda key, image: padded_crop(key, image, padding))(keys(1, draws), image)
    if padding == 5:  # Several shifts leave nothing of an image with five rows, or the same of it.
        allowed = np.unique(allowed, axis=0)
    counts = np.bincount(members(views, allowed), minlength=len(allowed))
    assert (counts > 0).all()
    if padding < 5:
        expected = draws / len(allowed)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("flips", [False, True])
def test_flip_crop_views(flips):
    image, partner = images(2), images(3)
    augmentation = compiled("flip_crop", flip=flips, padding=1)
    views, own = augmentation(keys(2, 300), np.tile(image, (300, 1, 1, 1)), np.tile(partner, (300, 1, 1, 1)))
    allowed = shifts(image, 1)
    if flips:
        allowed = np.concatenate([allowed, shifts(image[:, ::-1], 1)])
    assert set(members(views, allowed)) == set(range(len(allowed)))
    np.testing.assert_array_equal(own, 1)


def test_none_is_the_identity_with_the_examples_own_label():
    x = images(4, 7)
    views, own = compiled("none", padding=99)(keys(3, 7), x, images(5, 7))
    np.testing.assert_array_equal(views, x)
    np.testing.assert_array_equal(own, np.ones(7))


# --- blending -----------------------------------------------------------------------------------------------------------


BLEND = for_each(blend)


@pytest.fixture(scope="module")
def blends():
    """Masks (n, H, W, C) and own weights (n,): blending black with white shows the mask."""
    return tuple(np.asarray(a) for a in BLEND(keys(6, 4000), jnp.zeros(SHAPE), jnp.ones(SHAPE)))


def test_blend_is_a_pixelwise_convex_combination(blends):
    masks, own = blends
    x, partner = images(7), images(8)
    views, again = BLEND(keys(6, 4000), x, partner)
    np.testing.assert_array_equal(again, own)
    np.testing.assert_allclose(views, x * (1 - masks) + partner * masks, rtol=0, atol=1e-6)
    assert masks.min() >= 0 and masks.max() <= 1
    np.testing.assert_array_equal(masks, np.broadcast_to(masks[..., :1], masks.shape))


def test_label_weight_is_the_share_of_the_image_that_is_left(blends):
    masks, own = blends
    np.testing.assert_allclose(own, 1 - masks.mean((1, 2, 3)), atol=1e-6)


def test_half_are_mixup_with_a_uniform_share_and_half_cutmix(blends):
    masks, own = blends
    binary = ((masks == 0) | (masks == 1)).all((1, 2, 3))
    assert abs(binary.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(masks[~binary], np.broadcast_to(masks[~binary][:, :1, :1], masks[~binary].shape))
    shares = np.sort(1 - own[~binary])
    assert np.abs(shares - (np.arange(len(shares)) + 0.5) / len(shares)).max() < 0.05  # Kolmogorov–Smirnov against uniform
    assert np.ptp(own[binary]) > 0.9


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_cut_box_is_a_rectangle_of_the_share_less_what_the_border_clips(share):
    height, width, draws = 9, 12, 4000
    boxes = np.asarray(for_each(lambda key, share: cut_box(key, share, height, width))(keys(9, draws), jnp.float32(share)))[..., 0]
    assert set(np.unique(boxes)) <= {0.0, 1.0}
    rows, columns = boxes.max(2), boxes.max(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] * columns[:, None, :])
    for line in (rows, columns):  # one run without gaps, no longer than the side of the box
        assert (np.abs(np.diff(line, axis=1, prepend=0, append=0)).sum(1) <= 2).all()
        assert line.sum(1).max() <= np.ceil(np.sqrt(share) * line.shape[1])

    def covered(size):
        """Mean over pixels of the chance that a centre uniform in [0, 1] is nearer than half a side."""
        centres, half = (np.arange(size) + 0.5) / size, np.sqrt(share) / 2
        return (np.minimum(centres + half, 1) - np.maximum(centres - half, 0)).mean()

    areas = boxes.mean((1, 2))
    assert abs(areas.mean() - covered(height) * covered(width)) < 5 * areas.std() / np.sqrt(draws) + 1e-6
    if share == 0:
        assert not boxes.any()


def test_matching_blends_a_view_of_each_and_moves_them_apart():
    """White images and black partners, shifted: where the mask is 0 the white one's border shows, never more than the mask allows."""
    count = 200
    augmentation = compiled("matching", padding=2)
    white, black = np.ones((count, *SHAPE), np.float32), np.zeros((count, *SHAPE), np.float32)
    own_part, own = augmentation(keys(10, count), white, black)
    partner_part, again = augmentation(keys(10, count), black, white)
    np.testing.assert_array_equal(own, again)
    assert (own_part + partner_part <= 1 + 1e-6).all()  # (1 − mask) and mask, each with its border of zeros
    together, _ = augmentation(keys(10, count), white, white)
    np.testing.assert_allclose(together, own_part + partner_part, atol=1e-6)
    unshifted = compiled("matching", padding=0)
    masks, own = (np.asarray(a) for a in unshifted(keys(10, count), black, white))
    np.testing.assert_allclose(own, 1 - masks.mean((1, 2, 3)), atol=1e-6)
    # The two are not shifted alike: somewhere only one of them has lost its top row.
    lost_own, lost_partner = (np.isclose(part[:, 0], 0).all((1, 2)) for part in (np.asarray(own_part), np.asarray(partner_part)))
    assert (lost_own != lost_partner).any()


# --- randomness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "flip_crop", "matching"])
def test_views_depend_on_key_and_position_alone(name):
    """The same batch whole, in two halves, and in another order."""
    augmentation = compiled(name, padding=1)
    x, partners, position, key = images(11, 6), images(12, 6), np.arange(6), jax.random.key(13)

    def views(chosen):
        return [np.asarray(a) for a in augmentation(example_keys(key, position[chosen]), x[chosen], partners[chosen])]

    whole = views(np.arange(6))
    halves = [np.concatenate(parts) for parts in zip(views(np.arange(3)), views(np.arange(3, 6)), strict=True)]
    order = np.array([4, 0, 5, 2, 1, 3])
    for a, b, c in zip(whole, halves, views(order), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[order], c)
    assert whole[0].min() >= 0 and whole[0].max() <= 1
    assert whole[1].min() >= 0 and whole[1].max() <= 1


def test_example_keys_are_folded_from_step_and_position():
    step = jax.random.key(14)
    found = jax.random.key_data(example_keys(step, jnp.array([0, 3, 7])))
    for row, position in zip(found, (0, 3, 7), strict=True):
        np.testing.assert_array_equal(row, jax.random.key_data(jax.random.fold_in(step, position)))
    assert len(np.unique(found, axis=0)) == 3


@pytest.mark.parametrize("name", ["flip_crop", "matching"])
def test_padding_beyond_the_side_is_an_error_with_the_limit(name):
    create_augmentation(AugmentConfig(name, padding=5), SHAPE)
    with pytest.raises(UsageError, match="augment.padding is 6; .* 5"):
        create_augmentation(AugmentConfig(name, padding=6), SHAPE)
