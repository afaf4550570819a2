"""Pure augmentations in pixel space. Every example has its own key, so a batch is the same on one device or many."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from wdkd.config import AugmentConfig
from wdkd.errors import UsageError


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors an image (H, W, C) left to right with probability ½."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def padded_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Shifts an image (H, W, C) by up to `padding` pixels each way; what comes in is 0."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (row, column, 0), image.shape)


def cut_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """A random box of about `share` of the area, clipped at the border, as a mask (H, W, 1) of 0 and 1 (Yun et al. 2019)."""
    row_key, column_key = jax.random.split(key)
    half = jnp.sqrt(share) / 2
    rows = jnp.abs(jnp.arange(height) + 0.5 - jax.random.uniform(row_key) * height) < half * height
    columns = jnp.abs(jnp.arange(width) + 0.5 - jax.random.uniform(column_key) * width) < half * width
    return (rows[:, None] & columns[None, :]).astype(jnp.float32)[..., None]


def blend(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), each with probability ½ and a share uniform in [0, 1].

    Returns the blended image (H, W, C) and the weight of `image`'s own label, a scalar in [0, 1].
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    share = jax.random.uniform(share_key)
    box = cut_box(box_key, share, *image.shape[:2])
    mask = jnp.where(jax.random.bernoulli(choice_key), jnp.full_like(box, share), box)
    return image * (1 - mask) + partner * mask, 1 - mask.mean()


def create_augmentation(config: AugmentConfig, image_shape: tuple[int, ...]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function (keys (B,), images, partners (B, H, W, C)) -> (views, own weights (B,)).

    A view is what teacher and student both see; a label is own weight × own label + the rest × the partner's.

    Raises:
      UsageError: if the padding exceeds the image's side.
    """
    if config.name != "none" and config.padding > min(image_shape[:2]):
        raise UsageError(f"augment.padding is {config.padding}; it must be at most the image's side, {min(image_shape[:2])}")

    def move(key: jax.Array, image: jax.Array) -> jax.Array:
        flip_key, crop_key = jax.random.split(key)
        image = flip(flip_key, image) if config.flip else image
        return padded_crop(crop_key, image, config.padding)

    def matching(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        own_key, partner_key, blend_key = jax.random.split(key, 3)
        return blend(blend_key, move(own_key, image), move(partner_key, partner))

    def flip_crop(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        return move(key, image), jnp.ones(())

    def none(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        return image, jnp.ones(())

    return jax.vmap({"none": none, "flip_crop": flip_crop, "matching": matching}[config.name])


@functools.partial(jax.vmap, in_axes=(None, 0))
def example_keys(step_key: jax.Array, position: jax.Array) -> jax.Array:
    """One key per example from the step's key and the example's position in the global batch."""
    return jax.random.fold_in(step_key, position)


@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def view_keys(key: jax.Array, image: jax.Array, view: jax.Array) -> jax.Array:
    """One key per fixed view, from the image's index and the view's number."""
    return jax.random.fold_in(jax.random.fold_in(key, image), view)
