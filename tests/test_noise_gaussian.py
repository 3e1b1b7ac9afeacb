"""Gaussian noising: schedules, conversions, posteriors, the bound, weights and paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t2i_jax.noise import gaussian
from t2i_jax.noise.gaussian import join, split
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.noise.schedule import NAMES, Schedule, midpoints, respacing, stratified

KINDS = ("eps", "x0", "v", "velocity", "drift", "score")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_schedules_lose_the_picture_step_by_step(name):
    s = Schedule.named(name, 1000)
    assert s.betas.dtype == np.float64 and ((s.betas > 0) & (s.betas <= 1)).all()
    assert (np.diff(s.alphas_cumprod) < 0).all() and s.alphas_cumprod[0] > 0.97
    np.testing.assert_allclose(np.cumprod(1 - s.betas), s.alphas_cumprod, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(s.alpha**2 + s.sigma**2, 1, rtol=1e-12)
    assert np.isfinite(s.posterior_log_variance).all()


def test_a_schedule_may_end_in_noise_alone():
    plain, s = (Schedule.named("scaled_linear", 100, zero_terminal_snr=z) for z in (False, True))
    assert s.alpha[-1] == 0 and s.snr[-1] == 0 and s.betas[-1] == 1
    np.testing.assert_allclose(s.alpha[0], plain.alpha[0], rtol=1e-12)
    with pytest.raises(ValueError, match="noise schedule 'lin' is not one of"):
        Schedule.named("lin")


def test_respacing_keeps_the_noise_of_the_steps_it_keeps():
    s = Schedule.named("cosine", 1000)
    for spacing, count in {"100": 100, "10,6,4": 20, "ddim25": 25, "fast27": 27}.items():
        few = s.respaced(spacing)
        assert len(few) == count and few.original == 1000
        np.testing.assert_allclose(few.alphas_cumprod, s.alphas_cumprod[few.timestep_map], rtol=1e-12)
    assert respacing(1000, "ddim4") == [0, 250, 500, 750] and respacing(10, "1") == [0]
    for wrong, message in {"ddim300": "no whole stride", "11": "cannot be taken", "0": "cannot be taken"}.items():
        with pytest.raises(ValueError, match=message):
            respacing(1000 if wrong.startswith("ddim") else 10, wrong)


@pytest.mark.parametrize(("steps", "stride", "spacing"), [(20, False, "20"), (7, False, "7"), (25, True, "ddim25")])
def test_a_traced_number_of_steps_gives_the_same_tables(steps, stride, spacing):
    s = Schedule.named("linear", 1000)
    few, traced = s.respaced(spacing), jax.jit(lambda n: vars_of(s.strided(n, 64, stride), steps))(steps)
    for name, array in traced.items():
        np.testing.assert_allclose(array, getattr(few, name), rtol=2e-5, atol=1e-6, err_msg=name)


def vars_of(schedule, count):
    names = ("timestep_map", "betas", "alpha", "sigma", "posterior_log_variance")
    return {name: getattr(schedule, name)[:count] for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_convert_into_each_other_and_back(kind):
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    for alpha, sigma in ((0.8, 0.6), (0.3, 0.7), (1.0, 5.0)):
        x = alpha * x0 + sigma * eps
        found = split(kind, join(kind, x0, eps, alpha, sigma), x, alpha, sigma)
        np.testing.assert_allclose(found[0], x0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], eps, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="prediction 'noise' is not one of"):
        split("noise", x0, x, alpha, sigma)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["snr", "truncated_snr", "min_snr"])
def test_weights_are_of_the_error_in_the_picture_whatever_is_predicted(name, kind):
    rng = np.random.default_rng(1)
    x0, wrong, eps = (jnp.asarray(rng.normal(size=(50,)), jnp.float32) for _ in range(3))
    alpha, sigma = jnp.float32(0.9), jnp.float32(0.9**-2 - 1) ** 0.5
    x = alpha * x0 + sigma * eps
    prediction = join(kind, wrong, (x - alpha * wrong) / sigma, alpha, sigma)
    squared = (prediction - join(kind, x0, eps, alpha, sigma)) ** 2
    ours = gaussian.loss_weight(name, kind, alpha, sigma, 0.5) * squared
    direct = gaussian.loss_weight(name, "x0", alpha, sigma, 0.5) * (wrong - x0) ** 2
    np.testing.assert_allclose(ours, direct, rtol=1e-3, atol=1e-5)


def test_the_posterior_is_that_of_two_steps():
    """q(x_{t-1} | x_t, x_0) by Bayes' rule from the prior q(x_{t-1} | x_0) and the likelihood q(x_t | x_{t-1})."""
    s, t = Schedule.named("linear", 50), 30
    x0, x = jnp.full((1, 2), 0.7), jnp.full((1, 2), -0.4)
    prior_mean, prior = np.sqrt(s.alphas_cumprod[t - 1]) * 0.7, 1 - s.alphas_cumprod[t - 1]
    slope, noise = np.sqrt(1 - s.betas[t]), s.betas[t]
    variance = 1 / (1 / prior + slope**2 / noise)
    mean = variance * (prior_mean / prior + slope * -0.4 / noise)
    q = gaussian.posterior(s, x0, x, jnp.asarray([t]))
    np.testing.assert_allclose(q.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(q.variance, variance, rtol=1e-5)


def test_learned_variance_lies_between_its_ends_and_a_perfect_network_has_no_gap():
    s, t = Schedule.named("cosine", 100), jnp.asarray([60, 99])
    ends = [gaussian.learned_range(s, jnp.full((2, 1), v), t)[:, 0] for v in (-1.0, 1.0)]
    np.testing.assert_allclose(ends[0], s.posterior_log_variance[t], rtol=1e-5)
    np.testing.assert_allclose(ends[1], np.log(s.betas[t]), rtol=1e-5)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 5))
    x = gaussian.q_sample(s, x0, t, eps)
    p = gaussian.p_mean_variance(s, eps, x, t, v=jnp.full_like(x, -1.0))
    np.testing.assert_allclose(gaussian.vb_terms(s, x0, x, t, p), 0, atol=1e-4)


def test_pixels_have_probabilities_that_sum_to_one():
    pixels = jnp.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.02), (-0.99, 0.3), (0.0, 2.0)):
        p = gaussian.GaussianParams(jnp.full(256, mean), jnp.full(256, 2 * np.log(std)), pixels)
        total = jnp.exp(gaussian.discretised_log_likelihood(pixels, p)).sum()
        np.testing.assert_allclose(total, 1, rtol=1e-4)


@pytest.mark.parametrize("process", [Discrete("cosine", 200), Flow(), Flow("uniform", shift=3.0), EDM()], ids=str)
def test_processes_agree_with_their_paths(process):
    path = jax.jit(lambda n: process.timesteps(n))(12)
    assert path.sigma[12] == 0 and path.alpha[12] == 1 and int(path.steps) == 12
    assert (np.diff(path.sigma[:13]) < 0).all() and (np.diff(path.alpha[:13]) > 0).all()
    t = process.quantile(stratified(jax.random.key(0), 4000))
    alpha, sigma = process.alpha_sigma(t, jnp.zeros((4000, 1)))
    assert alpha.shape == (4000, 1) and (sigma >= 0).all() and (sigma <= 1.00001).all()
    assert np.isfinite(process.network_time(t)).all() and float(sigma.std()) > 0.1


TRAINED = {
    "discrete": (Discrete("cosine", 50), lambda t: np.clip(np.floor(t) + 1, 0, 50) / 50),
    "uniform flow": (Flow("uniform"), lambda t: (t - 1e-5) / (1 - 1e-5)),
    "shifted flow": (Flow("uniform", shift=3.0), lambda t: t / (3 - 2 * t)),
    "flow": (Flow(mean=0.4, std=0.8), lambda t: scipy.stats.norm.cdf((np.log(t / (1 - t)) - 0.4) / 0.8)),
    "edm": (EDM(), lambda t: scipy.stats.norm.cdf((t + 1.2) / 1.2)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_times_of_a_batch_are_stratified_and_each_alone_has_its_law(name):
    process, cdf = TRAINED[name]
    b, draw = 25, jax.jit(lambda key, b: process.quantile(stratified(key, b)), static_argnums=1)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, b)))(jax.random.split(jax.random.key(0), 2000)))
    assert (draw(jax.random.key(3), b) != draw(jax.random.key(4), b)).any()
    if name == "discrete":  # 50 times in 25 strata of two
        assert (np.sort(drawn // 2, 1) == np.arange(b)).all()
        counts = np.bincount(drawn[:, 3], minlength=50)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
    else:
        places = np.sort(np.floor(cdf(drawn.astype(np.float64)) * b - 1e-4), 1)
        assert (np.abs(places - np.arange(b)) <= 1e-4).mean() > 0.999
        for row in (0, 13):
            assert scipy.stats.kstest(drawn[:, row], cdf).pvalue > 1e-3
    grid = np.asarray(process.quantile(midpoints(b)))
    assert (np.diff(grid) > 0).all() and np.isfinite(grid).all()
    np.testing.assert_allclose(cdf(grid.astype(np.float64)), (np.arange(b) + 0.5) / b, atol=0.02)


@pytest.mark.parametrize("b", [1, 2, 7, 64, 4096, 65536])
def test_each_stratum_holds_one_number(b):
    for seed in range(5):
        u = np.asarray(jax.jit(stratified, static_argnums=1)(jax.random.key(seed), b))
        assert u.dtype == np.float32 and (u > 0).all() and (u < 1).all()
        np.testing.assert_array_equal(np.sort(np.floor(u * np.float32(b))), np.arange(b))
    np.testing.assert_allclose(midpoints(b), (np.arange(b) + 0.5) / b, rtol=1e-6)


def test_numbers_of_strata_are_in_random_order():
    """The places of rows are not tied to each other, nor to where in its stratum a number is."""
    u = np.asarray(jax.vmap(lambda k: stratified(k, 4))(jax.random.split(jax.random.key(0), 4000)))
    place, inside = np.floor(u * 4), u * 4 % 1
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1] + 1 / 3) < 0.05  # all four places are taken once
    assert abs(np.corrcoef(place[:, 0], inside[:, 0])[0, 1]) < 0.05
    assert scipy.stats.kstest(inside[:, 2], "uniform").pvalue > 1e-3


def test_edm_predicts_v_of_the_scaled_picture():
    """F of Karras et al., with D(x) = c_skip x + c_out F, is -v."""
    edm, s, x0, n = EDM(), 1.7, 0.4, -0.6
    noised, d = x0 + s * n, edm.data
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / np.sqrt(s**2 + d**2)
    alpha, sigma = edm.alpha_sigma(jnp.log(jnp.asarray([s])), jnp.zeros(1))
    np.testing.assert_allclose(alpha * x0 * edm.scale + sigma * n, noised / np.sqrt(s**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(join("v", x0 * edm.scale, n, alpha, sigma), -(x0 - c_skip * noised) / c_out, rtol=1e-5)
