"""models/maskgit.py against the recorded released transformer: five times the difference a correct one may have."""

import functools

import goldens_maskgit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.errors import UserError
from dimo_jax.guidance import guidance_scale, guided_head
from dimo_jax.mdm import masked_mean, token_nll
from dimo_jax.models import maskgit
from dimo_jax.models.layers import dropout
from dimo_jax.nets import logits

RECORDED = goldens_maskgit.load()
SPEC = goldens_maskgit.spec_of(RECORDED)
NET = maskgit.as_net(SPEC)
PARAMS = jax.tree.map(jnp.asarray, goldens_maskgit.to_tree(RECORDED, "state_dict/"))
IDS = jnp.asarray(RECORDED["in/codes"].reshape(5, 16))
LABELS = jnp.asarray(RECORDED["in/labels"])
DROPPED = jnp.full_like(LABELS, SPEC.num_classes)
MIXED = jnp.where(RECORDED["in/drop"], DROPPED, LABELS)
NO_NOISE = jnp.zeros(NET.noise_shape(5))

jit = functools.partial(jax.jit, compiler_options=goldens_maskgit.QUICK)


def close(value, expected, atol):
    np.testing.assert_allclose(value, expected, rtol=0, atol=atol)


@jit
def forward(x, labels, sigma=0.0, noise=NO_NOISE):
    """Logits at guidance scale 1; without noise at sigma 0."""
    return guided_head(NET, PARAMS, x, labels, DROPPED, 0.0, 1, sigma=sigma, noise=noise)(0, 16)


@jit
def forward_guided(labels, scale):
    """Guided logits; scale [B]."""
    return guided_head(NET, PARAMS, IDS, labels, DROPPED, 0.0, scale)(0, 16)


def smoothed_loss(params, net=NET, x=IDS):
    target, masked = (RECORDED[f"in/ce_{name}"].reshape(5, 16) for name in ("target", "mask"))
    return masked_mean(token_nll(logits(net, params, x, LABELS, 0.0), jnp.asarray(target), 0.1), masked)


@pytest.fixture(scope="module")
def loss_and_gradient():
    return jit(jax.value_and_grad(smoothed_loss))(PARAMS)


def test_random_parameters_have_the_recorded_shapes():
    made = jax.eval_shape(lambda: maskgit.init(SPEC, jax.random.key(0)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, a.dtype), PARAMS)


@pytest.mark.parametrize(
    ("labels", "name"), [(LABELS, "logits"), (MIXED, "logits_drop_mixed"), (DROPPED, "logits_drop_all")]
)
def test_logits(labels, name):
    close(forward(IDS, labels), RECORDED[f"out/{name}"], 2e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_perturbed_embeddings(sigma):
    noise = jnp.asarray(RECORDED[f"in/noise_{sigma}"])
    close(forward(IDS, LABELS, sigma, noise), RECORDED[f"out/logits_noise_{sigma}"], 2e-5)


@pytest.mark.parametrize(
    ("labels", "scale", "name"),
    [
        (LABELS, jnp.full(5, 2.0), "2.0"),
        (LABELS, jnp.asarray(RECORDED["in/cfg_per_sample"]), "per_sample"),
        (MIXED, jnp.full(5, 2.0), "2.0_drop_mixed"),
    ],
    ids=["fixed", "per sample", "mixed labels"],
)
def test_guidance(labels, scale, name):
    close(forward_guided(labels, scale), RECORDED[f"out/logits_cfg_{name}"], 5e-5)


def test_guidance_scales():
    """1 + (s - 1) r, or s everywhere; 1 and 0 give the conditional and the unconditional logits."""
    ratio = jnp.asarray([0.0, 0.25, 1.0])
    np.testing.assert_allclose(guidance_scale(5.0, ratio, adaptive=True), [1, 2, 5])
    assert guidance_scale(5.0, ratio, adaptive=False) == 5.0
    assert guidance_scale(1.0, ratio, adaptive=True) == 1.0  # a number: no unconditional branch is run
    ends = forward_guided(LABELS, jnp.asarray([1.0, 0.0, 1.0, 0.0, 1.0]))
    close(ends[::2], forward(IDS, LABELS)[::2], 2e-5)
    close(ends[1::2], forward(IDS, DROPPED)[1::2], 2e-5)


def test_guidance_runs_one_batch_of_both_branches():
    """Scale 1 runs B samples, any other 2 B in a single call."""
    seen = []
    net = NET._replace(trunk=lambda params, x, *a, **k: seen.append(len(x)) or NET.trunk(params, x, *a, **k))
    for scale in (1, 1.0, 2.0):
        jax.eval_shape(lambda scale=scale: guided_head(net, PARAMS, IDS, LABELS, DROPPED, 0.0, scale)(0, 16))
    assert seen == [5, 5, 10]


def test_smoothed_loss_and_every_gradient(loss_and_gradient):
    loss, gradient = loss_and_gradient
    close(loss, RECORDED["out/ce_loss"], 2e-5)
    expected = goldens_maskgit.to_tree(RECORDED, "out/ce_grad/")
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    for (path, value), recorded in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, recorded, rtol=0, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_remat_and_unrolled_layers_give_the_same_gradient(loss_and_gradient):
    net = maskgit.as_net(goldens_maskgit.spec_of(RECORDED, remat=True, unroll=3))
    gradient = jit(jax.grad(functools.partial(smoothed_loss, net=net)))(PARAMS)
    jax.tree.map(functools.partial(close, atol=1e-6), gradient, loss_and_gradient[1])


@pytest.fixture(scope="module")
def features():
    """h, blocks and d(h . w)/dx at one-hot tokens, and d(h . w)/d(embeddings) by way of the noise at sigma 1."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16, SPEC.width)), jnp.float32)

    def score(soft, noise, sigma):
        h, seen = NET.features(PARAMS, soft, LABELS, 0.0, sigma=sigma, noise=noise)
        return jnp.sum(h * weights), (h, seen["blocks"])

    @jit
    def run(soft, noise, sigma):
        return jax.value_and_grad(score, argnums=(0, 1), has_aux=True)(soft, noise, sigma)

    soft = jax.nn.one_hot(IDS, SPEC.codebook_size + 1)
    ((_, (h, blocks)), (to_soft, _)) = run(soft, NO_NOISE, 0.0)
    (_, (_, to_embeddings)) = run(soft, PARAMS["tok_emb"][IDS], 1.0)
    return h, blocks, to_soft, to_embeddings


def test_one_hot_tokens_are_ids(features):
    h, blocks, _, _ = features
    assert blocks.shape == (SPEC.depth, 5, 17, SPEC.width)
    close(NET.head(PARAMS, h, 0, 16), forward(IDS, LABELS), 2e-5)


def test_features_pass_a_gradient_to_soft_tokens(features):
    """The chain rule through the table: d/dx = d/d(embedding) table^T."""
    _, _, to_soft, to_embeddings = features
    expected = to_embeddings @ PARAMS["tok_emb"][: SPEC.codebook_size + 1].T
    assert np.abs(expected).max() > 1
    close(to_soft, expected, 1e-5 * np.abs(expected).max())


def test_head_by_slices_is_the_whole(features):
    whole = NET.head(PARAMS, features[0], 0, 16)
    slices = [NET.head(PARAMS, features[0], start, 4) for start in (0, 4, 8, 12)]
    close(jnp.concatenate(slices, axis=1), whole, 1e-6 * np.abs(whole).max())
    narrow = maskgit.as_net(goldens_maskgit.spec_of(RECORDED, num_logits=SPEC.codebook_size))
    close(narrow.head(PARAMS, features[0], 0, 16), whole[..., :-1], 1e-6 * np.abs(whole).max())


def test_dropout_is_on_with_a_key_and_off_without():
    net = maskgit.as_net(goldens_maskgit.spec_of(RECORDED, dropout=0.1))
    dropped = jit(lambda seed: logits(net, PARAMS, IDS, LABELS, 0.0, dropout_rng=jax.random.key(seed)))
    first, second = dropped(0), dropped(1)
    np.testing.assert_array_equal(dropped(0), first)
    assert np.abs(first - second).max() > 0.1 and np.abs(first - forward(IDS, LABELS)).max() > 0.1
    close(jit(lambda: logits(net, PARAMS, IDS, LABELS, 0.0))(), forward(IDS, LABELS), 2e-5)


def test_dropout_keeps_the_mean():
    """A share `rate` is 0, the rest is divided by 1 - rate."""
    x = dropout(jnp.ones(20_000), 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.75], rtol=1e-6)
    assert abs(np.mean(x == 0) - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 20_000)


def test_attention_mask_closes_the_pairs_it_names():
    """In one layer, h of position i depends on token j exactly where the mask says that i may look at j (or j = i)."""
    net = maskgit.as_net(goldens_maskgit.spec_of(RECORDED, depth=1))
    params = {**PARAMS, "blocks": jax.tree.map(lambda a: a[:1], PARAMS["blocks"])}
    may_look = jnp.asarray(np.random.default_rng(0).random((1, 16, 16)) < 0.5) | jnp.eye(16, dtype=bool)

    @jit
    def influence(soft):  # [L, L]: how much h_i moves with token j
        def trunk(soft):
            return jnp.sum(net.trunk(params, soft, LABELS[:1], 0.0, attn_mask=may_look)[0], -1)

        return jnp.abs(jax.jacrev(trunk)(soft)[:, 0]).sum(-1)

    np.testing.assert_array_equal(influence(jax.nn.one_hot(IDS[:1], 25)) > 0, may_look[0])


def test_impossible_architectures_are_refused():
    with pytest.raises(UserError, match="num_logits is codebook_size 24, or one more; given 30"):
        goldens_maskgit.spec_of(RECORDED, num_logits=30)
    with pytest.raises(UserError, match="width 32 does not divide over 5 heads"):
        goldens_maskgit.spec_of(RECORDED, heads=5)
