"""The whitening layer: what it does to patches, that nothing moves it, and that it is of the run's own images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from wdkd.config import ModelConfig
from wdkd.data import few_shot_split, load_dataset
from wdkd.models import apply_network, create_model, initialize, with_whitening
from wdkd.run_directory import read_trained
from wdkd.train import run
from wdkd.whitening import FLOOR, whitening_filters


def smooth_images(channels, count=40, side=12):
    """uint8 images whose neighbouring pixels are alike, as those of photographs."""
    random = np.random.default_rng(0)
    rough = random.normal(size=(count, side + 2, side + 2, channels)) + random.normal(size=(count, 1, 1, channels))
    mean = sum(rough[:, i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9
    return (128 + 50 * mean).clip(0, 255).astype(np.uint8)


def statistics(images):
    x = images.reshape(-1, images.shape[-1]) / 255
    return x.mean(0), x.std(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_responses_on_patches_are_uncorrelated_with_unit_variance(channels):
    images = smooth_images(channels)
    mean, std = statistics(images)
    filters = whitening_filters(images, mean, std)
    assert filters.shape == (2, 2, channels, 8 * channels)
    # In float64, patch by patch, without the function's own way to gather them.
    x = (images / 255 - mean) / std
    patches = np.array([image[i : i + 2, j : j + 2].ravel() for image in x for i in range(11) for j in range(11)])
    responses = patches @ filters.reshape(4 * channels, -1).astype(np.float64)
    half = responses.shape[1] // 2
    np.testing.assert_allclose(responses[:, half:], -responses[:, :half])
    covariance = np.cov(responses[:, :half].T, bias=True)
    variances = np.linalg.eigvalsh(np.cov(patches.T, bias=True))[::-1]
    np.testing.assert_allclose(covariance, np.diag(variances / (variances + FLOOR)), atol=2e-4)


def test_images_of_one_colour_give_finite_filters():
    filters = whitening_filters(np.full((3, 8, 8, 1), 7, np.uint8), np.array([7 / 255]), np.array([1 / 255]))
    assert np.isfinite(filters).all()


def test_the_layer_convolves_with_the_filters_of_the_images():
    images = smooth_images(3)
    mean, std = statistics(images)
    model = create_model(ModelConfig("whitened_cnn", 4), classes=5, mean=mean, std=std)
    variables = with_whitening(initialize(model, jax.random.key(0), (12, 12, 3)), images, {"mean": mean, "std": std})
    x = images[:2] / np.float32(255)
    _, seen = model.apply(variables, jnp.asarray(x), capture_intermediates=True, mutable=["intermediates"])
    (said,) = seen["intermediates"]["Whitening_0"]["__call__"]
    patch = ((x[1, 3:5, 6:8] - mean) / std).astype(np.float64)
    expected = np.einsum("ijc,ijcf->f", patch, whitening_filters(images, mean, std).astype(np.float64))
    np.testing.assert_allclose(said[1, 3, 6], expected, rtol=1e-4, atol=1e-4)


def test_a_network_without_the_layer_stays_as_it_is():
    model = create_model(ModelConfig("cnn", 4), classes=5, mean=(0.5,), std=(0.5,))
    variables = initialize(model, jax.random.key(0), (8, 8, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, variables, with_whitening(variables, None, None)))


def test_no_gradient_reaches_the_filters_and_all_other_parameters_have_one():
    images = smooth_images(3)
    mean, std = statistics(images)
    model = create_model(ModelConfig("whitened_cnn", 8), classes=5, mean=mean, std=std)
    variables = initialize(model, jax.random.key(0), (12, 12, 3))
    x = jnp.asarray(images[:4] / np.float32(255))
    gradients = jax.grad(lambda params: (apply_network(model, {"params": params}, x).logits ** 2).sum())(variables["params"])
    moved = {name: any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree)) for name, tree in gradients.items()}
    assert {name for name, any_moved in moved.items() if not any_moved} == {"Whitening_0"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_training_and_weight_decay_leave_the_filters_of_the_subset(optimizer, tmp_path):
    config = tiny(model__name="whitened_cnn", optimizer__name=optimizer, optimizer__weight_decay=0.1)
    run(config, tmp_path / "run", show_progress=False)
    trained = read_trained(tmp_path / "run")
    split = few_shot_split(load_dataset(config.data), config.data, config.seed)
    given = trained.variables["input"]
    np.testing.assert_array_equal(
        trained.variables["params"]["Whitening_0"]["filters"], whitening_filters(split.train_images, given["mean"], given["std"])
    )
