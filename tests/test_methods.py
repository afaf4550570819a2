"""Objectives against explicit Jacobians and NumPy, on networks small enough to differentiate by hand in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wdkd import methods
from wdkd.config import MethodConfig, ModelConfig, OptimizerConfig
from wdkd.errors import UsageError
from wdkd.input_gradients import toward_boundary
from wdkd.methods import METHODS, STAGES, Batch, Seen, Stage, boundary_loss, create_stages, robust, stage_ends
from wdkd.models import Outputs, create_model
from wdkd.state import create_optimizer, initialize_connectors, join_params, split_params

BATCH, PIXELS, CLASSES = 4, (2, 3, 1), 3
STUDENT = {"stage1": (1, 2, 2), "stage2": (1, 2, 3), "stage3": (2, 2, 2)}
TEACHER = {"stage1": (1, 2, 2), "stage2": (1, 2, 4), "stage3": (4, 4, 5)}
"""Shapes of hidden features: the same, other channels, and another resolution too."""


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compiling takes nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def network(seed, shapes):
    """Weights of a network of four dense layers whose hidden features have the given shapes."""
    random = np.random.default_rng(seed)
    sizes = [np.prod(shape) for shape in (PIXELS, *shapes.values(), (CLASSES,))]
    return [random.normal(size=(i, o)) / np.sqrt(i) * 1.5 for i, o in zip(sizes, sizes[1:], strict=False)]


def apply(weights, x, shapes):
    """Smooth, so that second derivatives are everywhere what they seem."""
    hidden, y = {}, x.reshape(x.shape[0], -1)
    for weight, (stage, shape) in zip(weights, shapes.items(), strict=False):
        y = y @ weight
        hidden[stage] = y.reshape(-1, *shape)
        y = jnp.tanh(y)
    return Outputs(y @ weights[-1], hidden)


S, T = network(0, STUDENT), network(1, TEACHER)
X = np.random.default_rng(2).uniform(size=(BATCH, *PIXELS))
LABELS = np.random.default_rng(3).dirichlet(np.ones(CLASSES), BATCH)


def keys(seed=4):
    return jax.random.split(jax.random.key(seed), BATCH)


def seer(student=None, *, teacher=T, shapes=TEACHER, connectors=None, variables=None):
    """What steps.py gives an objective, for these networks."""

    def see(x, through_teacher):
        ours = apply(S if student is None else student, x, STUDENT)
        theirs = None if teacher is None else apply(teacher, x if through_teacher else jax.lax.stop_gradient(x), shapes)
        connected = {}
        if connectors is not None:
            connected, _ = connectors.apply(variables, ours.hidden, theirs.hidden, mutable=["batch_stats"])
        return Seen(ours, theirs, connected, LABELS), None

    return see


def evaluate(stage, seed=4, **seen):
    """(objective, aux) of a stage."""
    random = keys(seed)
    return jax.jit(lambda x: stage.objective(seer(**seen), Batch(x, LABELS, random), lambda values: values))(X)


def last_stage(name, **options):
    return create_stages(MethodConfig(name, **options))[-1]


@pytest.fixture(scope="module")
def exact():
    """Logits (B, C) and input Jacobians (B, C, pixels) of student and teacher, one example and one class at a time."""
    with jax.enable_x64(True):
        found = []
        for weights, shapes in ((S, STUDENT), (T, TEACHER)):
            one = lambda x, weights=weights, shapes=shapes: apply(weights, x[None], shapes).logits[0]  # noqa: E731
            logits, jacobians = jax.jit(lambda x, one=one: (jax.vmap(one)(x), jax.vmap(jax.jacrev(one))(x)))(X)
            found += [np.asarray(logits), np.asarray(jacobians).reshape(BATCH, CLASSES, -1)]
        return found


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(loss, s, t, temperature):
    """(ℓ (B,), ∂l/∂o^S, ∂l/∂o^T (B, C))."""
    if loss == "ce":
        q = softmax(s)
        return -(LABELS * np.log(q)).sum(-1), q - LABELS, np.zeros_like(t)
    if loss == "mse":
        return np.square(s - t).mean(-1), 2 / CLASSES * (s - t), -2 / CLASSES * (s - t)
    if loss == "distance":
        norm = np.linalg.norm(s - t, axis=-1)
        return norm, (s - t) / norm[:, None], -(s - t) / norm[:, None]
    p, q = softmax(t / temperature), softmax(s / temperature)
    log_ratio = np.log(p / q)
    kl = (p * log_ratio).sum(-1)
    return temperature**2 * kl, temperature * (q - p), temperature * p * (log_ratio - kl[:, None])


def back(jacobians, cotangents):
    return np.einsum("bcp,bc->bp", jacobians, cotangents)


# --- the worst case of the outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_teacher", [True, False])
@pytest.mark.parametrize("loss", ["kl", "mse", "distance", "ce"])
def test_wdkd_is_the_mean_loss_and_the_mean_norm_of_its_input_gradient(exact, loss, through_teacher):
    """∇ₓℓ = J_Sᵀ ∂l/∂o^S + J_Tᵀ ∂l/∂o^T, the second term only through the teacher."""
    s, js, t, jt = exact
    values, to_student, to_teacher = by_hand(loss, s, t, 3.0)
    gradients = back(js, to_student) + through_teacher * back(jt, to_teacher)
    norms = np.linalg.norm(gradients, axis=1)
    stage = last_stage("wdkd", loss=loss, temperature=3.0, epsilon=0.7, through_teacher=through_teacher)
    value, aux = evaluate(stage)
    np.testing.assert_allclose(aux.loss, values.mean(), rtol=1e-9)
    np.testing.assert_allclose(aux.input_gradient_norm, norms.mean(), rtol=1e-9)
    np.testing.assert_allclose(value, values.mean() + 0.7 * norms.mean(), rtol=1e-9)
    if loss != "ce":  # The two ways must be told apart by this very test.
        assert abs(norms.mean() / np.linalg.norm(back(js, to_student), axis=1).mean() - 1) > 0.01 or not through_teacher


@pytest.mark.parametrize(
    ("ground_norm", "dual", "aggregate", "combine"),
    [
        ("1", np.inf, "max", np.max),
        ("2", 2, "rms", lambda norms: np.sqrt(np.square(norms).mean())),
        ("inf", 1, "mean", np.mean),
    ],
)
def test_ground_norm_and_aggregate_reach_the_objective(exact, ground_norm, dual, aggregate, combine):
    s, js, t, jt = exact
    values, to_student, to_teacher = by_hand("kl", s, t, 4.0)
    norms = np.linalg.norm(back(js, to_student) + back(jt, to_teacher), ord=dual, axis=1)
    value, _ = evaluate(last_stage("wdkd", epsilon=0.5, ground_norm=ground_norm, aggregate=aggregate))
    np.testing.assert_allclose(value, values.mean() + 0.5 * combine(norms), rtol=1e-9)


def objective_of(stage):
    """The objective as a function of the student's weights."""
    random = keys()
    return lambda weights: stage.objective(seer(weights), Batch(X, LABELS, random), lambda values: values)[0]


def test_without_a_ball_wdkd_is_kd_and_with_one_kd_is_wdkd():
    """The same program, derivatives included; without a ball not one that computes input gradients and multiplies them by 0."""

    def program(name, **options):
        return str(jax.make_jaxpr(jax.value_and_grad(objective_of(last_stage(name, **options))))(S))

    plain, ball = program("kd"), program("wdkd")
    assert program("wdkd", epsilon=0.0) == plain
    assert program("kd", epsilon=0.01) == ball
    assert len(ball.splitlines()) > 1.5 * len(plain.splitlines())
    value, aux = evaluate(last_stage("kd"))
    assert value == aux.loss and np.isnan(aux.input_gradient_norm)


def test_gradient_of_the_worst_case_against_finite_differences():
    """The second derivative: the objective's slope along a random direction of all the student's weights."""
    stage, random, step = last_stage("wdkd", loss="distance", epsilon=0.5), np.random.default_rng(5), 1e-6
    direction = [random.normal(size=w.shape) for w in S]
    ahead, behind = (evaluate(stage, student=[w + h * d for w, d in zip(S, direction, strict=True)])[0] for h in (step, -step))
    gradients = jax.jit(jax.grad(objective_of(stage)))(S)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_a_perfect_student_is_where_the_objective_and_its_gradient_are_zero():
    """Where ‖g‖ has no derivative, that used is 0 and not NaN."""
    random = keys()
    for options in ({"name": "wdkd", "epsilon": 0.5}, {"name": "sobolev"}):
        stage = create_stages(MethodConfig(**options))[-1]

        def objective(weights, stage=stage):
            return stage.objective(seer(weights, teacher=S, shapes=STUDENT), Batch(X, LABELS, random), lambda values: values)[0]

        value, gradients = jax.jit(jax.value_and_grad(objective))(S)
        assert abs(value) < 1e-12
        assert all(np.abs(g).max() < 1e-9 for g in gradients)


@pytest.mark.parametrize("name", ["ce", "kd"])
def test_labels_alone_need_no_teacher(exact, name):
    """ce always learns from labels, whatever its loss; kd does when told so. No teacher is looked at."""
    stage = last_stage(name, loss="mse" if name == "ce" else "ce")
    assert not stage.needs_teacher
    np.testing.assert_allclose(evaluate(stage, teacher=None)[0], by_hand("ce", exact[0], exact[2], 1)[0].mean(), rtol=1e-9)


# --- Jacobian matching --------------------------------------------------------------------------------------------------


def directions(seed):
    """As documented: a normal draw from each example's key, at unit length."""
    drawn = np.array([jax.random.normal(key, (CLASSES,)) for key in keys(seed)])
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_sobolev_adds_the_distance_of_the_jacobians_along_a_direction(exact, loss, seed):
    s, js, t, jt = exact
    v = directions(seed)
    term = np.square(back(js - jt, v)).sum(1).mean()
    value, aux = evaluate(last_stage("sobolev", loss=loss, sobolev_weight=0.6), seed)
    values = by_hand(loss, s, t, 4.0)[0]
    np.testing.assert_allclose(aux.loss, values.mean(), rtol=1e-9)
    np.testing.assert_allclose(value, values.mean() + 0.6 * term, rtol=1e-7)
    assert term > 0.01 and create_stages(MethodConfig("sobolev", loss=loss))[0].needs_teacher


def test_sobolev_directions_are_uniform_on_the_sphere():
    """So that the term is, in the mean over draws, 1/C of the squared Frobenius distance of the Jacobians."""
    draws = 20_000
    many = jax.jit(jax.vmap(lambda key: methods._unit_vector(key, CLASSES)))(jax.random.split(jax.random.key(6), draws))
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(many.T @ many / draws, np.eye(CLASSES) / CLASSES, atol=5 / np.sqrt(draws) / CLASSES)
    np.testing.assert_allclose(many.mean(0), 0, atol=5 / np.sqrt(draws * CLASSES))


# --- boundary views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("kd", {}), ("kd", {"loss": "mse"}), ("wdkd", {"epsilon": 0.4}), ("sobolev", {"sobolev_weight": 0.6}), ("ab", {}), ("fitnet", {})],
)
def test_boundary_views_add_the_mean_loss_where_the_teacher_is_undecided(name, options):
    """Whatever else the stage minimises, at the images themselves; the moved ones are constants."""
    plain, seeking = (last_stage(name, boundary_radius=radius, **options) for radius in (0.0, 0.2))
    loss = methods.output_loss(MethodConfig(name, **options))
    folded = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys())
    moved = toward_boundary(lambda x: apply(T, x, TEACHER).logits, X, folded, 0.2)
    assert np.linalg.norm((moved - X).reshape(BATCH, -1), axis=1).max() <= 0.2 + 1e-9 and np.abs(moved - X).max() > 0.01

    def objective(weights, stage):
        value, aux = stage.objective(seer(weights), Batch(X, LABELS, keys()), lambda values: values)
        return value, aux.loss

    def expected(weights):
        value, here = objective(weights, plain)
        return value + loss(seer(weights)(moved, False)[0]).mean(), here

    found, wanted = (jax.jit(jax.value_and_grad(f, has_aux=True))(S) for f in (lambda w: objective(w, seeking), expected))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12), found, wanted)
    assert seeking.needs_teacher and seeking.reads is None and plain.reads is not None


# --- two stages ---------------------------------------------------------------------------------------------------------


def connect(stage, seed=7):
    """(connectors, random variables for them)."""
    connectors = stage.connectors(axis_name=None)
    ours, theirs = ({k: jnp.zeros((BATCH, *v)) for k, v in shapes.items()} for shapes in (STUDENT, TEACHER))
    shapes = jax.eval_shape(connectors.init, jax.random.key(0), ours, theirs)
    random = np.random.default_rng(seed)
    return {
        "connectors": connectors,
        "variables": jax.tree.map(lambda leaf: random.uniform(0.2, 1, leaf.shape) - 0.5 * (leaf.ndim > 1), shapes),
    }


def hidden():
    ours, theirs = jax.jit(lambda x: (apply(S, x, STUDENT).hidden, apply(T, x, TEACHER).hidden))(X)
    return {k: np.asarray(v) for k, v in ours.items()}, {k: np.asarray(v) for k, v in theirs.items()}


TWICE = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
"""Linear interpolation from two pixels to four, pixel centres at (i + ½) / n."""


def enlarged(h):
    return np.einsum("ri,cj,bijk->brck", TWICE, TWICE, h)


def boundary(s, t, margin):
    """Heo et al. 2019, unit by unit."""
    total = np.zeros(len(s))
    for b, a, c in zip(np.repeat(np.arange(len(s)), s[0].size), s.ravel(), t.ravel(), strict=True):
        if c <= 0 and a > -margin:
            total[b] += (a + margin) ** 2
        if c > 0 and a <= margin:
            total[b] += (a - margin) ** 2
    return total


@pytest.mark.parametrize("guided", STAGES)
def test_hint_is_half_the_mean_square_behind_a_regressor_with_bias(guided):
    stage = create_stages(MethodConfig("fitnet", fitnet_stage=guided))[0]
    seen = connect(stage)
    regressor = seen["variables"]["params"]
    assert set(regressor) == {f"{guided}_conv"}  # also where the shapes agree
    kernel, bias = regressor[f"{guided}_conv"]["kernel"], regressor[f"{guided}_conv"]["bias"]
    ours, theirs = (features[guided] for features in hidden())
    ours = enlarged(ours) if guided == "stage3" else ours
    assert kernel.shape == (1, 1, ours.shape[-1], theirs.shape[-1])
    expected = 0.5 * np.square(ours @ kernel[0, 0] + bias - theirs).mean((1, 2, 3))
    value, aux = evaluate(stage, **seen)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-7)
    assert value == aux.loss and np.isnan(aux.input_gradient_norm)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_boundary_weighs_stages_a_quarter_a_half_and_one(norm):
    """Identity where shapes agree, else a convolution without bias and a batch norm over the batch's own statistics."""
    stage = create_stages(MethodConfig("ab", connector_norm=norm, ab_margin=0.8))[0]
    seen = connect(stage)
    params = seen["variables"]["params"]
    ours, theirs = hidden()
    expected = 0.25 * boundary(ours["stage1"], theirs["stage1"], 0.8)
    for name, weight in (("stage2", 0.5), ("stage3", 1.0)):
        assert set(params[f"{name}_conv"]) == {"kernel"}
        h = (enlarged(ours[name]) if name == "stage3" else ours[name]) @ params[f"{name}_conv"]["kernel"][0, 0]
        if norm == "batch":
            learned = params[f"{name}_norm"]["BatchNorm_0"]
            h = (h - h.mean((0, 1, 2))) / np.sqrt(h.var((0, 1, 2)) + 1e-5) * learned["scale"] + learned["bias"]
        expected = expected + weight * boundary(h, theirs[name], 0.8)
    assert set(params) == {
        f"{name}_{part}" for name in ("stage2", "stage3") for part in (("conv", "norm") if norm == "batch" else ("conv",))
    }
    np.testing.assert_allclose(evaluate(stage, **seen)[0], expected.mean(), rtol=1e-5)


@pytest.mark.parametrize(("norm", "apart"), [("group", True), ("none", True), ("batch", False)])
def test_which_connectors_keep_examples_apart(norm, apart):
    """An input gradient of one example's loss exists only where the others' pixels do not move it."""
    seen = connect(create_stages(MethodConfig("ab", connector_norm=norm))[0])
    see, per_example = seer(**seen), boundary_loss(1.0)
    gradients = jax.jit(jax.grad(lambda x: per_example(see(x, True)[0])[1]))(X)
    others = np.abs(np.delete(gradients, 1, axis=0)).max()
    assert np.abs(gradients[1]).max() > 0.01
    assert (others == 0) if apart else (others > 1e-3)


@pytest.mark.parametrize("name", ["fitnet", "ab"])
@pytest.mark.parametrize(("epsilon", "pretrain_epsilon"), [(None, 0.0), (0.4, 0.0), (0.0, 0.3)])
def test_each_stage_has_its_own_ball(name, epsilon, pretrain_epsilon):
    stages = create_stages(MethodConfig(name, epsilon=epsilon, pretrain_epsilon=pretrain_epsilon, connector_norm="group"))
    for stage, radius, seen in zip(stages, (pretrain_epsilon, epsilon or 0.0), (connect(stages[0]), {}), strict=True):
        value, aux = evaluate(stage, **seen)
        if radius:
            assert aux.input_gradient_norm > 0.01
            np.testing.assert_allclose(value, aux.loss + radius * aux.input_gradient_norm, rtol=1e-9)
        else:
            assert value == aux.loss and np.isnan(aux.input_gradient_norm)


def test_second_stage_is_kd():
    for name in ("fitnet", "ab"):
        assert evaluate(create_stages(MethodConfig(name))[1])[0] == evaluate(last_stage("kd"))[0]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("ce", [("outputs", None, True, False, False)]),
        ("kd", [("outputs", None, True, True, False)]),
        ("wdkd", [("outputs", None, True, True, False)]),
        ("sobolev", [("outputs", None, True, True, False)]),
        ("fitnet", [("hint", 0.3, False, True, True), ("outputs", None, True, True, False)]),
        ("ab", [("boundary", 0.3, False, True, True), ("outputs", None, True, True, False)]),
    ],
)
def test_stages_of_each_method(name, stages):
    found = create_stages(MethodConfig(name))
    assert [(s.name, s.share, s.decays, s.needs_teacher, s.connectors is not None) for s in found] == stages


# --- pre-training a real network ----------------------------------------------------------------------------------------


def test_hint_stage_trains_what_lies_below_the_guided_layer_and_leaves_the_rest_alone():
    """Two steps of AdamW with a strong decay: layers above keep every bit, those below and the regressor move."""
    with jax.enable_x64(False):
        model = create_model(ModelConfig("cnn", 4), classes=CLASSES, mean=[0.5], std=[0.3])
        config = MethodConfig("fitnet", fitnet_stage="stage2")
        (stage, _), random = create_stages(config), np.random.default_rng(8)
        shape = (3, 8, 8, 1)
        outputs, shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
        student = jax.tree.map(lambda leaf: (random.normal(size=leaf.shape) / 3 + (leaf.ndim == 1)).astype(np.float32), shapes)
        hint = {"stage2": random.normal(size=(3, 8, 8, 6)).astype(np.float32)}
        connectors = stage.connectors(axis_name=None)
        variables = {"student": student} | initialize_connectors(connectors, jax.random.key(0), outputs.hidden, hint)
        params, rest = split_params(variables)
        optimizer = create_optimizer(OptimizerConfig(warmup_fraction=0.0, weight_decay=0.5), steps=5, decay=stage.decays)
        x = random.uniform(size=shape).astype(np.float32)

        def objective(params):
            def see(x, through_teacher):
                joined = join_params(params, rest)
                ours = model.apply(joined["student"], x, train=True)
                return Seen(ours, Outputs(None, hint), connectors.apply(joined["connectors"], ours.hidden, hint), None), None

            return stage.objective(see, Batch(x, None, None), lambda values: values)[0]

        @jax.jit
        def step(params, state):
            gradients = jax.grad(objective)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, gradients

        after, state, gradients = step(params, optimizer.init(params))
        after, _, _ = step(after, state)
    above = {"Conv_4", "Norm_4", "Conv_5", "Norm_5", "head"}
    assert above < set(params["student"])
    for layer in params["student"]:
        for g, old, new in zip(*(jax.tree.leaves(tree["student"][layer]) for tree in (gradients, params, after)), strict=True):
            assert np.any(g) == (layer not in above)
            assert np.array_equal(old, new) == (layer in above)
    for old, new in zip(jax.tree.leaves(params["connectors"]), jax.tree.leaves(after["connectors"]), strict=True):
        assert not np.array_equal(old, new)


# --- stages and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9])
def test_stage_ends_share_all_the_steps_out(fraction):
    stages = create_stages(MethodConfig("ab", pretrain_fraction=fraction))
    for steps in range(2, 400):
        first, last = stage_ends(stages, steps)
        assert last == steps
        assert first == max(1, round(fraction * steps))
    assert stage_ends(create_stages(MethodConfig("kd")), 7) == (7,)


def test_stage_ends_of_the_default():
    assert stage_ends(create_stages(MethodConfig("fitnet")), 300) == (90, 300)


@pytest.mark.parametrize(
    ("name", "text"), [("wdk", "did you mean 'wdkd'"), ("fitnets", "did you mean 'fitnet'"), ("zzz", "Known: ab, ce, fitnet, kd")]
)
def test_unknown_method(name, text):
    with pytest.raises(UsageError, match=text):
        create_stages(MethodConfig(name))


def test_a_method_is_added_by_naming_its_stages(exact, monkeypatch):
    """Its per-example loss is all it says; the worst case comes with it, and the pre-training of another may go before."""

    def cosine(seen):
        s, t = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (seen.student.logits, seen.teacher.logits))
        return 1 - (s * t).sum(-1)

    monkeypatch.setitem(
        METHODS, "cosine", lambda config: (methods.hint_stage(config), Stage("angles", robust(cosine, config, config.radius)))
    )
    first, second = stages = create_stages(MethodConfig("cosine", epsilon=0.2))
    assert stage_ends(stages, 100) == (30, 100) and first.name == "hint"
    s, js, t, jt = exact
    lengths = [np.linalg.norm(z, axis=1, keepdims=True) for z in (s, t)]
    u, v = s / lengths[0], t / lengths[1]
    similar = (u * v).sum(1, keepdims=True)
    gradients = back(js, -(v - similar * u) / lengths[0]) + back(jt, -(u - similar * v) / lengths[1])
    value, _ = evaluate(second)
    np.testing.assert_allclose(value, (1 - similar).mean() + 0.2 * np.linalg.norm(gradients, axis=1).mean(), rtol=1e-9)
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        create_stages(MethodConfig("cosin"))
