"""Quality of generated images for small class-labelled sets, without any pretrained network.

Inception features mean little on 32×32 digits, and 50,000 images are out of reach of a two-minute evaluation. What
serves instead: a classifier fitted to the real training images, a Fréchet distance in a PCA space fitted to them, and
nearest-neighbour figures that a collapsed or memorised generator fails. Every figure stands beside what real images
score by the same protocol.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.evaluation.frechet import frechet_distance, gaussian_statistics
from unite_fast.evaluation.reconstruction import unit_images

# Held-out digits at 32×32: 98.9-99.4 % at side 16 over three splits, 98.9-99.2 % at side 8.
FEATURE_SIDE = 16
# 97.8 % of the digits' variance at 32×32.
COMPONENTS = 32
# Naeem et al. 2020 choose k = 5, for which equal distributions give a coverage above 0.95.
NEIGHBOURS = 5
# 1, 10 and 100 give 98.6, 99.4 and 99.4 % on the digits.
SVM_PENALTY = 10.0
FEWEST_GENERATED = 2  # a class: a spread needs two
# A generated image is a near copy if it lies closer to a training image than 99 % of the held-out images do.
NEAR_COPY_QUANTILE = 0.01


class SmallDataJudge:
    """Judges generated images against a small real training set and its held-out part.

    Features are pixels in [0, 1], area-averaged to at most 16×16, in float64. Two instances made from the same images
    give the same numbers: nothing is drawn at random without a fixed seed.

    Build it before a long training run: all that can be wrong with the real images is said here.
    """

    def __init__(
        self,
        train_images: Tensor,
        train_labels: Tensor,
        held_out_images: Tensor,
        held_out_labels: Tensor,
        *,
        components: int = COMPONENTS,
        neighbours: int = NEIGHBOURS,
    ):
        """Fit the classifier and the PCA to the training images.

        Args:
            train_images: [N, 3, H, W], uint8 or floating point in [0, 1].
            train_labels: [N] integers.
            held_out_images: [M, 3, H, W], of the training images' size.
            held_out_labels: [M] integers, the same classes.
            components: k of the PCA space of the Fréchet distance.
            neighbours: k of the nearest-neighbour balls.

        Raises:
            UserError: too few images, NaN images, sizes or classes that differ, fewer than two classes.
        """
        self.components, self.neighbours = components, neighbours
        self.image_shape = tuple(train_images.shape[1:])
        train, self._train_labels = self._prepare(train_images, train_labels, "training images")
        held_out, self._held_out_labels = self._prepare(held_out_images, held_out_labels, "held-out images")
        self.classes = np.unique(self._train_labels)
        if len(self.classes) < 2:
            raise UserError("the training images have one class only: small-data metrics need at least two")
        self._same_classes(self._held_out_labels, "held-out images")
        self._at_least(self._held_out_labels, neighbours + 1, "held-out images")
        self._at_least(self._train_labels, neighbours + 1, "training images")
        # One component fewer than images is all that centred data can span.
        limit = min(len(train) - 1, train.shape[1])
        if components > limit:
            raise UserError(
                f"{len(train)} training images of {train.shape[1]} feature values allow at most {limit} PCA "
                f"components, {components} were asked for: add training images or ask for fewer components"
            )
        self._train, self._held_out = train, held_out
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self._svm = SVC(C=SVM_PENALTY, kernel="rbf", gamma="scale").fit(train, self._train_labels)
        self._pca = PCA(n_components=components, svd_solver="full").fit(train)
        self._unit = float(np.sqrt(self._pca.explained_variance_.sum()))
        self._held_out_statistics = self._statistics(held_out)
        self._held_out_nearest = _nearest(held_out, train)
        if np.median(self._held_out_nearest) == 0:
            raise UserError("most held-out images are also training images: split the data set again")
        self._classwise = {c: self._held_out_class(c) for c in self.classes}
        self._real_accuracy = float((self._svm.predict(held_out) == self._held_out_labels).mean())

    def judge(self, generated: Tensor, labels: Tensor) -> dict[str, float | int]:
        """Every figure of generated images [G, 3, H, W] asked for as classes labels [G].

        Figures that end in `_train` come from training images by the same protocol: as many a class as were
        generated, or all of them where fewer exist, drawn without replacement from a fixed seed.

        Returns:
            class_accuracy: share that the SVM assigns to the class asked for; class_accuracy_worst, of the worst class;
                class_accuracy_real, of held-out images: the ceiling.
            frechet_pca: Fréchet distance of generated to held-out images in the space of the training images'
                `frechet_components` first principal components, scaled so that the training variance there sums to
                1: a generator that knows only the mean image scores about 1. frechet_pca_train: the floor.
            coverage: share of held-out images whose ball, which reaches to their k-th nearest held-out neighbour of
                the class, holds a generated image of the class; coverage_worst, of the worst class; precision: share
                of generated images inside such a ball; density: mean number of balls around a generated image, over
                k. (Naeem et al. 2020, within each class, averaged over classes.) Each with its `_train`.
            spread: RMS distance of generated images to the mean of their class over that of held-out images, averaged
                over classes; 1 healthy, 0 one image a class. spread_train.
            nearest_train_ratio: median distance of generated images to their nearest training image over that of
                held-out images; about 1 healthy, about 0 memorised. near_copies: share of generated images closer to
                a training image than 99 % of held-out images are; about 0.01 healthy, 1 memorised.
            images_generated, images_train, images_held_out, frechet_components, neighbours, feature_side: the protocol.

        Raises:
            UserError: fewer than two images of a class, NaN images (says how many), another size or set of classes.
        """
        features, asked = self._prepare(generated, labels, "generated images")
        self._same_classes(asked, "generated images")
        self._at_least(asked, FEWEST_GENERATED, "generated images")
        correct = self._svm.predict(features) == asked
        chosen = self._same_count(asked)
        reference, reference_labels = self._train[chosen], self._train_labels[chosen]
        nearest = _nearest(features, self._train)
        near = np.quantile(self._held_out_nearest, NEAR_COPY_QUANTILE)
        figures: dict[str, float | int] = {
            "class_accuracy": float(correct.mean()),
            "class_accuracy_worst": min(float(correct[asked == c].mean()) for c in self.classes),
            "class_accuracy_real": self._real_accuracy,
            "frechet_pca": frechet_distance(*self._statistics(features), *self._held_out_statistics),
            "frechet_pca_train": frechet_distance(*self._statistics(reference), *self._held_out_statistics),
        }
        of_generated = self._manifold(features, asked)
        of_train = self._manifold(reference, reference_labels)
        for name, value in of_generated.items():
            figures[name] = value
            figures[f"{name}_train"] = of_train[name]
        return figures | {
            "nearest_train_ratio": float(np.median(nearest) / np.median(self._held_out_nearest)),
            "near_copies": float((nearest < near).mean()),
            "images_generated": len(asked),
            "images_train": len(chosen),
            "images_held_out": len(self._held_out),
            "frechet_components": self.components,
            "neighbours": self.neighbours,
            "feature_side": min(FEATURE_SIDE, *self.image_shape[1:]),
        }

    def _manifold(self, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Coverage, precision, density and spread of features [G, d] against the held-out images, class by class."""
        coverage, precision, density, spread = [], [], [], []
        for c in self.classes:
            real, radius, real_spread = self._classwise[c]
            fake = features[labels == c]
            inside = _distances(real, fake) <= radius[:, None]  # [real, fake]
            coverage.append(inside.any(1).mean())
            precision.append(inside.any(0).mean())
            density.append(inside.sum(0).mean() / self.neighbours)
            spread.append(_rms_radius(fake) / real_spread)
        return {
            "coverage": float(np.mean(coverage)),
            "coverage_worst": float(np.min(coverage)),
            "precision": float(np.mean(precision)),
            "density": float(np.mean(density)),
            "spread": float(np.mean(spread)),
        }

    def _held_out_class(self, label: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Held-out features of a class, the radius of each one's ball, and the class's RMS distance to its mean."""
        features = self._held_out[self._held_out_labels == label]
        # Column 0 of the sorted distances is each image's distance to itself.
        radius = np.sort(_distances(features, features), axis=1)[:, self.neighbours]
        spread = _rms_radius(features)
        if spread == 0:
            raise UserError(f"all held-out images of class {label} are the same image: nothing can be compared to them")
        return features, radius, spread

    def _statistics(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return gaussian_statistics(self._pca.transform(features) / self._unit)

    def _same_count(self, labels: np.ndarray) -> np.ndarray:
        """Indices of training images, as many a class as in labels where there are so many."""
        draw = np.random.default_rng(0)
        chosen = []
        for c in self.classes:
            own = draw.permutation(np.flatnonzero(self._train_labels == c))
            chosen.append(own[: int((labels == c).sum())])
        return np.concatenate(chosen)

    def _prepare(self, images: Tensor, labels: Tensor, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, 3·side²] float64 and labels [N] int64."""
        pixels = unit_images(images, what)
        if tuple(pixels.shape[1:]) != self.image_shape:
            raise UserError(
                f"{what} are {list(pixels.shape[1:])} and the training images {list(self.image_shape)}: "
                "all must have one size"
            )
        labels = torch.as_tensor(labels).cpu()
        if labels.is_floating_point() or labels.shape != (len(pixels),):
            raise UserError(
                f"{what}: labels must be {len(pixels)} integers, one per image, "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        side = min(FEATURE_SIDE, *self.image_shape[1:])
        return F.adaptive_avg_pool2d(pixels.double(), side).flatten(1).numpy(), labels.long().numpy()

    def _same_classes(self, labels: np.ndarray, what: str) -> None:
        found = np.unique(labels)
        missing, unknown = np.setdiff1d(self.classes, found), np.setdiff1d(found, self.classes)
        if len(missing) or len(unknown):
            parts = [f"lack {_listing(missing)}"] * bool(len(missing))
            parts += [f"have {_listing(unknown)}, which training lacks"] * bool(len(unknown))
            raise UserError(f"{what} and training images must have the same classes: {what} {' and '.join(parts)}")

    def _at_least(self, labels: np.ndarray, count: int, what: str) -> None:
        classes, counts = np.unique(labels, return_counts=True)
        if counts.min() < count:
            raise UserError(
                f"too few {what}: class {classes[counts.argmin()]} has {counts.min()}, "
                f"small-data metrics need at least {count} per class"
            )


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [len(a), len(b)] between rows."""
    # The matrix-product form is quick but leaves 1e-7 where the distance is 0; a ball must hold its own centre.
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _nearest(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance [len(queries)] of each query to its nearest point."""
    # 512 rows at a time: 41 MB against 10,000 training images.
    return np.concatenate(
        [_distances(queries[i : i + 512], points).min(1) for i in range(0, len(queries), 512)]
    )


def _rms_radius(features: np.ndarray) -> float:
    """Root of the mean squared distance to the mean, unbiased: [n, d] -> number."""
    return float(np.sqrt(features.var(axis=0, ddof=1).sum()))


def _listing(classes: np.ndarray) -> str:
    names = ", ".join(str(c) for c in classes[:5])
    return f"class{'es' * (len(classes) > 1)} {names}{', …' * (len(classes) > 5)}"
