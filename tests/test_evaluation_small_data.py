"""Small-data metrics on real digits: healthy images pass, each way to cheat fails the figure made for it."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from unite_fast.errors import UserError
from unite_fast.evaluation.frechet import frechet_distance, gaussian_statistics
from unite_fast.evaluation.small_data import SmallDataJudge

PER_CLASS = 60


@pytest.fixture(scope="module")
def digits():
    """Three disjoint parts of the digits at 32×32: training, held out, and fresh ones as a perfect generator's."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images / 16).float()[:, None], size=32, mode="bicubic").clamp(0, 1)
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(data.target)
    rest, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, fresh = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    return {
        name: (images[part].contiguous(), labels[part])
        for name, part in (("train", train), ("held_out", held_out), ("fresh", fresh))
    }


@pytest.fixture(scope="module")
def judge(digits):
    return SmallDataJudge(*digits["train"], *digits["held_out"])


def _balanced(images, labels):
    """PER_CLASS images of each class, class by class."""
    index = torch.cat([torch.nonzero(labels == c).flatten()[:PER_CLASS] for c in range(10)])
    return images[index], labels[index]


def _noisy(images, sigma):
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@pytest.fixture(scope="module")
def healthy(digits, judge):
    images, labels = _balanced(*digits["fresh"])
    return judge.judge(_noisy(images, 0.05), labels)


def test_real_images_with_noise_pass(healthy):
    assert healthy["class_accuracy"] > 0.96
    assert healthy["class_accuracy_worst"] > 0.9
    assert healthy["class_accuracy_real"] > 0.96
    assert healthy["frechet_pca"] < 2 * healthy["frechet_pca_train"]
    assert healthy["coverage"] > 0.95 and healthy["coverage_worst"] > 0.85
    assert healthy["precision"] > 0.9 and healthy["density"] > 0.8
    assert 0.9 < healthy["spread"] < 1.1
    assert 0.85 < healthy["nearest_train_ratio"] < 1.15
    assert healthy["near_copies"] < 0.05


def test_reference_figures_are_healthy_too(healthy):
    assert 0 < healthy["frechet_pca_train"] < 0.05
    assert healthy["coverage_train"] > 0.95
    assert 0.9 < healthy["spread_train"] < 1.1
    assert healthy["images_generated"] == healthy["images_train"] == 10 * PER_CLASS
    assert healthy["frechet_components"] == 32 and healthy["feature_side"] == 16 and healthy["neighbours"] == 5


def test_record_is_json_and_repeatable(digits, judge, healthy):
    images, labels = _balanced(*digits["fresh"])
    again = SmallDataJudge(*digits["train"], *digits["held_out"]).judge(_noisy(images, 0.05), labels)
    assert again == healthy
    assert json.loads(json.dumps(again, allow_nan=False)) == again


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_memorised_images_fail_the_memorisation_figure_alone(digits, judge, sigma):
    images, labels = _balanced(*digits["train"])
    figures = judge.judge(_noisy(images, sigma), labels)
    assert figures["class_accuracy"] > 0.98 and figures["coverage"] > 0.95
    assert figures["frechet_pca"] < 2 * figures["frechet_pca_train"]
    assert figures["nearest_train_ratio"] < 0.3
    assert figures["near_copies"] > 0.99


def test_half_memorised_images_show_in_near_copies(digits, judge):
    (copies, labels), (fresh, fresh_labels) = _balanced(*digits["train"]), _balanced(*digits["fresh"])
    figures = judge.judge(torch.cat([copies[::2], fresh[::2]]), torch.cat([labels[::2], fresh_labels[::2]]))
    assert 0.45 < figures["near_copies"] < 0.6


def test_one_repeated_image_a_class_fails_diversity(digits, judge, healthy):
    images, labels = _balanced(*digits["train"])
    one = images[::PER_CLASS].repeat_interleave(PER_CLASS, 0)
    figures = judge.judge(one, labels)
    assert figures["class_accuracy"] == 1.0
    assert figures["spread"] == pytest.approx(0, abs=1e-6)
    assert figures["coverage"] < 0.4
    assert figures["frechet_pca"] > 10 * healthy["frechet_pca"]


def test_one_collapsed_class_shows_in_the_worst_class(digits, judge):
    images, labels = _balanced(*digits["fresh"])
    images = images.clone()
    images[:PER_CLASS] = images[0]
    figures = judge.judge(images, labels)
    assert figures["coverage"] > 0.85
    assert figures["coverage_worst"] < 0.6


def test_shuffled_labels_fail_class_accuracy_and_precision(digits, judge, healthy):
    images, labels = _balanced(*digits["fresh"])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    figures = judge.judge(images, shuffled)
    assert figures["class_accuracy"] < 0.2
    assert figures["precision"] < 0.5 < healthy["precision"]


def test_noise_fails_everything(judge):
    labels = torch.arange(10).repeat_interleave(10)
    images = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    figures = judge.judge(images, labels)
    assert figures["class_accuracy"] < 0.3
    assert figures["coverage"] == figures["precision"] == 0
    assert figures["nearest_train_ratio"] > 2
    assert figures["frechet_pca"] > 1


def test_mean_image_has_a_frechet_distance_near_one(digits, judge):
    mean = digits["train"][0].mean(0).expand(20, -1, -1, -1)
    assert judge.judge(mean, torch.arange(10).repeat(2))["frechet_pca"] == pytest.approx(1, abs=0.1)


def test_held_out_images_have_distance_zero(digits, judge):
    figures = judge.judge(*digits["held_out"])
    assert figures["frechet_pca"] == pytest.approx(0, abs=1e-10)
    assert figures["nearest_train_ratio"] == 1
    assert figures["coverage"] == figures["precision"] == 1
    assert figures["class_accuracy"] == figures["class_accuracy_real"]


def test_uint8_images_judge_like_floats(digits, judge):
    images, labels = _balanced(*digits["fresh"])
    levels = (images * 255).round()
    of_bytes, of_floats = judge.judge(levels.byte(), labels), judge.judge(levels / 255, labels)
    assert of_bytes == pytest.approx(of_floats)


def test_the_training_reference_matches_each_class_count(digits, judge):
    images, labels = digits["fresh"]
    keep = (labels == 3) | (torch.arange(len(labels)) % 3 == 0)
    figures = judge.judge(images[keep], labels[keep])
    train_counts = torch.bincount(digits["train"][1])
    asked_counts = torch.bincount(labels[keep])
    assert figures["images_train"] == int(torch.minimum(train_counts, asked_counts).sum())


def test_balls_by_hand():
    """Flat images on a line: two classes of four held-out greys 0, .1, .3, .7 and the same for blue, k = 2."""
    levels = torch.tensor([0.0, 0.1, 0.3, 0.7])

    def flat(values, channels):
        return values.view(-1, 1, 1, 1) * torch.tensor(channels).view(1, 3, 1, 1).expand(-1, -1, 8, 8)

    held_out = torch.cat([flat(levels, [1.0, 1.0, 1.0]), flat(levels, [0.0, 0.0, 1.0])])
    train = torch.cat([flat(levels + 0.05, [1.0, 1.0, 1.0]), flat(levels + 0.05, [0.0, 0.0, 1.0])])
    labels = torch.tensor([0] * 4 + [1] * 4)
    judge = SmallDataJudge(train, labels, held_out, labels, components=2, neighbours=2)
    # The balls reach to the second neighbour: [-.3, .3], [-.1, .3], [0, .6] and [.1, 1.3].
    asked = torch.cat([flat(torch.tensor([0.45, 0.5]), c) for c in ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])])
    figures = judge.judge(asked, torch.tensor([0, 0, 1, 1]))
    assert figures["coverage"] == figures["coverage_worst"] == 0.5  # both lie in the last two balls and no other
    assert figures["precision"] == 1
    assert figures["density"] == 1  # two balls an image, over k = 2
    assert figures["spread"] == pytest.approx(np.std([0.45, 0.5], ddof=1) / np.std(levels.numpy(), ddof=1), rel=1e-5)
    # Blue images at .45 and .5 lie .1 and .15 from .35, grey ones √3 times as far. Held-out images lie .05 from
    # theirs in blue, and so does the black one of the greys: five of eight.
    distances = [0.1, 0.15, 0.1 * 3**0.5, 0.15 * 3**0.5]
    assert figures["nearest_train_ratio"] == pytest.approx(np.median(distances) / 0.05, rel=1e-5)


def test_generated_images_that_cannot_be_judged(digits, judge):
    images, labels = _balanced(*digits["fresh"])
    broken = images.clone()
    broken[:7, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="7 of 600 generated images contain NaN"):
        judge.judge(broken, labels)
    with pytest.raises(UserError, match="lack class 9"):
        judge.judge(images[labels != 9], labels[labels != 9])
    with pytest.raises(UserError, match="have class 10, which training lacks"):
        judge.judge(torch.cat([images, images[:1]]), torch.cat([labels, torch.tensor([10])]))
    with pytest.raises(UserError, match=r"too few generated images: class 0 has 1, .* at least 2"):
        judge.judge(images[PER_CLASS - 1 :], labels[PER_CLASS - 1 :])
    with pytest.raises(UserError, match="all must have one size"):
        judge.judge(images[:, :, :16, :16], labels)
    with pytest.raises(UserError, match="600 integers"):
        judge.judge(images, labels[:-1])
    with pytest.raises(UserError, match="600 integers, one per image, got torch.float32"):
        judge.judge(images, labels.float())


def test_real_images_that_cannot_be_judged_by(digits):
    train, held_out = digits["train"], digits["held_out"]
    few = torch.cat([torch.nonzero(held_out[1] == c).flatten()[: 5 if c == 4 else 6] for c in range(10)])
    with pytest.raises(UserError, match=r"too few held-out images: class 4 has 5, .* at least 6"):
        SmallDataJudge(*train, held_out[0][few], held_out[1][few])
    with pytest.raises(UserError, match="lack class 2"):
        SmallDataJudge(*train, held_out[0][held_out[1] != 2], held_out[1][held_out[1] != 2])
    with pytest.raises(UserError, match="one class only"):
        SmallDataJudge(train[0], torch.zeros(len(train[0]), dtype=torch.int64), *held_out)
    with pytest.raises(UserError, match="split the data set again"):
        SmallDataJudge(*train, *train)
    same = held_out[0].clone()
    same[held_out[1] == 6] = same[held_out[1] == 6][0]
    with pytest.raises(UserError, match="class 6 are the same image"):
        SmallDataJudge(*train, same, held_out[1])
    with pytest.raises(UserError, match="allow at most 717 PCA components, 1000 were asked for"):
        SmallDataJudge(*train, *held_out, components=1000)


def _covariance(size, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T / rank


def test_statistics_are_unbiased():
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    mean, covariance = gaussian_statistics(features)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0))
    with pytest.raises(UserError, match="at least 2 images"):
        gaussian_statistics(features[:1])


@pytest.mark.parametrize("size", [1, 3, 40])
def test_frechet_agrees_with_scipy(size):
    a, b = _covariance(size, 2 * size, 0), _covariance(size, 2 * size, 1)
    mean_a, mean_b = np.random.default_rng(2).normal(size=(2, size))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("smallest", [1.0, 1e-8, 1e-14, 0.0])
def test_frechet_of_commuting_covariances_closed_form(smallest):
    """Σ(√a - √b)² in a rotated basis, down to singular covariances, where SciPy's square root breaks down."""
    size = 30
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    a, b = np.linspace(1, 2, size), np.linspace(3, 1, size)
    a[::2], b[::3] = smallest, smallest
    distance = frechet_distance(
        np.zeros(size), rotation * a @ rotation.T, np.ones(size), rotation * b @ rotation.T
    )
    # An eigenvalue that is truly there below the rounding of the largest (1e-14) is lost, its root of 1e-7 with it.
    tolerance = 1e-7 if 0 < smallest < 1 else 1e-12
    assert distance == pytest.approx(size + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=tolerance)


def test_frechet_of_fewer_images_than_features():
    """Rank 4 in 60 dimensions: zero to itself, and tr(A) + tr(B) to a covariance of orthogonal support."""
    a = _covariance(60, 4, 0)
    assert frechet_distance(np.zeros(60), a, np.zeros(60), a) == pytest.approx(0, abs=1e-12)
    left, right = np.zeros((60, 60)), np.zeros((60, 60))
    left[:30, :30], right[30:, 30:] = _covariance(30, 4, 1), _covariance(30, 4, 2)
    distance = frechet_distance(np.zeros(60), left, np.zeros(60), right)
    assert distance == pytest.approx(np.trace(left) + np.trace(right), rel=1e-12)
    assert frechet_distance(np.zeros(60), left, np.zeros(60), np.zeros((60, 60))) == pytest.approx(np.trace(left))
