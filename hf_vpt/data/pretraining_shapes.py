"""Labelled images that are drawn, not downloaded: fractals, closed contours and, on request, stroke glyphs.

Every class is a recipe for a point cloud; an instance perturbs the recipe, splats the cloud on the pixel grid with a
random stroke width, and takes a random pose, colour, resolution and noise. A whole batch is drawn at once with a few
matrix products. The fractals follow formula-driven supervised learning (Kataoka et al., https://arxiv.org/abs/2101.08515);
the contours add closed outlines, which attractors seldom contain. Glyphs are close to handwriting: a backbone that had
seen 500 of them, among others, did nearly as well on digits with its head alone as with prompts. The packaged one has
seen none.

Letters in shapes: B images, P points per image, K maps of one fractal, S strokes of one glyph, C control points of one
stroke.
"""

import math

import torch
import torch.nn.functional as F


IMAGE_SIZE = 32
POINTS = 384
RESOLUTIONS = (8, 8, 12, 16, 32, 32)  # drawn with equal chance; the digits used downstream are 8 x 8 images enlarged


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """A tensor of `shape` with entries uniform in [low, high)."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """Turn angles of shape (...) into rotation matrices of shape (..., 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def fit_to_square(points: torch.Tensor) -> torch.Tensor:
    """Centre clouds (B, P, 2) and scale each by one number, so that its longer side spans [-1, 1]."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    half_side = ((high - low) / 2).amax(-1, keepdim=True).clamp(min=1e-6)
    return (points - (low + high) / 2) / half_side


class Fractals:
    """Attractors of random iterated function systems, drawn by the chaos game.

    A class holds K affine maps x -> A x + b. Maps are chosen with a probability proportional to |det A|, which covers
    the attractor evenly. Systems whose attractor covers too few cells of a coarse grid are rejected: they are dots.
    """

    num_maps = 4
    min_coverage = 0.2

    def __init__(self, num_classes: int, generator: torch.Generator):
        kept = [self._candidates(0, generator)]
        while sum(len(matrix) for matrix, _, _ in kept) < num_classes:
            kept.append(self._candidates(max(2 * num_classes, 64), generator))
        self.matrix, self.offset, self.weight = (torch.cat(parts)[:num_classes] for parts in zip(*kept))

    def _candidates(self, num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample `num` systems; return A (kept, K, 2, 2), b (kept, K, 2) and weights (kept, K) of the good ones."""
        shape = (num, self.num_maps)
        angles = uniform((2, *shape), -math.pi, math.pi, generator)
        # Singular values well below one: a walker forgets its starting point within the few steps that `points` takes.
        stretch = torch.diag_embed(uniform((*shape, 2), 0.15, 0.8, generator))
        matrix = rotation(angles[0]) @ stretch @ rotation(angles[1])
        offset = uniform((*shape, 2), -1.0, 1.0, generator)
        weight = torch.linalg.det(matrix).abs() + 0.01
        # Two to four maps per system; an unused map keeps its place with weight zero.
        used = torch.randint(2, self.num_maps + 1, (num, 1), generator=generator)
        weight = weight * (torch.arange(self.num_maps) < used)
        cloud = fit_to_square(self._chaos_game(matrix, offset, weight, generator))
        cells = ((cloud + 1) * 7.999).long()
        hit = torch.zeros(num, 256).scatter_(1, cells[..., 0] * 16 + cells[..., 1], 1.0)
        good = hit.mean(1) >= self.min_coverage
        return matrix[good], offset[good], weight[good]

    def _chaos_game(
        self, matrix: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Let P / 4 walkers run in parallel and return where they stood in the last four steps, (B, P, 2)."""
        num_walkers, visited = POINTS // 4, []
        rows = torch.arange(len(matrix))[:, None]
        point = torch.zeros(len(matrix), num_walkers, 2)
        for _ in range(14):
            choice = torch.multinomial(weight, num_walkers, replacement=True, generator=generator)
            point = (matrix[rows, choice] @ point[..., None])[..., 0] + offset[rows, choice]
            visited.append(point)
        return torch.cat(visited[-4:], 1)

    def __len__(self) -> int:
        return len(self.matrix)

    def points(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw one perturbed instance per class index (B,) as points (B, P, 2)."""
        matrix, offset, weight = self.matrix[index], self.offset[index], self.weight[index]
        matrix = matrix * uniform(matrix.shape, 0.85, 1.15, generator)
        offset = offset + 0.06 * torch.randn(offset.shape, generator=generator)
        return self._chaos_game(matrix, offset, weight, generator)


class Glyphs:
    """Invented characters: one to three smooth strokes.

    A stroke is a pen that walks with a slowly changing heading, kept as C control points of a Catmull-Rom curve.
    Classes differ in where strokes start, how they bend and how many there are; an instance jitters control points.
    """

    num_strokes, num_controls = 3, 6

    def __init__(self, num_classes: int, generator: torch.Generator):
        shape = (num_classes, self.num_strokes)
        start = uniform((*shape, 1, 2), -0.8, 0.8, generator)
        heading = uniform((*shape, 1), -math.pi, math.pi, generator)
        # One bend per stroke plus little changes, so that a stroke is an arc, a hook or a loop rather than a scribble.
        bend = uniform((*shape, 1), -1.4, 1.4, generator)
        wobble = 0.5 * torch.randn((*shape, self.num_controls - 1), generator=generator)
        heading = heading + (bend + wobble).cumsum(-1)
        step = uniform((*shape, 1, 1), 0.2, 0.7, generator) * torch.stack([heading.cos(), heading.sin()], -1)
        self.controls = torch.cat([start, start + step.cumsum(-2)], -2)
        # An unused stroke repeats a used one; an instance jitters both alike, so nothing extra appears.
        used = torch.randint(1, self.num_strokes + 1, (num_classes, 1), generator=generator)
        self.stroke_of = torch.arange(self.num_strokes).expand(shape) % used
        self.controls = fit_to_square(self.controls.gather(1, self._expanded(self.stroke_of)).flatten(1, 2)).unflatten(
            1, (self.num_strokes, self.num_controls)
        )
        self.basis = self._catmull_rom_basis(-(-POINTS // self.num_strokes))

    def _expanded(self, stroke_of: torch.Tensor) -> torch.Tensor:
        """Repeat stroke numbers (B, S) for use with `gather` on controls (B, S, C, 2)."""
        return stroke_of[:, :, None, None].expand(-1, -1, self.num_controls, 2)

    def _catmull_rom_basis(self, num_points: int) -> torch.Tensor:
        """Weights (num_points, C) that turn C control points into a curve which passes through all of them."""
        t = torch.linspace(0, self.num_controls - 1 - 1e-4, num_points)
        segment, t = t.long(), t.frac()
        cubic = 0.5 * torch.stack(
            [-(t**3) + 2 * t**2 - t, 3 * t**3 - 5 * t**2 + 2, -3 * t**3 + 4 * t**2 + t, t**3 - t**2], 1
        )
        basis = torch.zeros(num_points, self.num_controls)
        for neighbour in range(4):
            # Beyond its ends a curve repeats its first and last control point.
            column = (segment + neighbour - 1).clamp(0, self.num_controls - 1)
            basis.scatter_add_(1, column[:, None], cubic[:, neighbour : neighbour + 1])
        return basis

    def __len__(self) -> int:
        return len(self.controls)

    def points(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw one perturbed instance per class index (B,) as points (B, P, 2)."""
        controls = self.controls[index]
        jitter = 0.07 * torch.randn(controls.shape, generator=generator)
        # A whole stroke moves as well, as in handwriting, where strokes meet or miss each other.
        jitter = jitter + 0.07 * torch.randn((*controls.shape[:2], 1, 2), generator=generator)
        controls = controls + jitter.gather(1, self._expanded(self.stroke_of[index]))
        return torch.einsum("pc,bscd->bspd", self.basis, controls).flatten(1, 2)[:, :POINTS]


class Contours:
    """Closed curves around a centre: blobs, polygons and stars, some as an outline and some filled."""

    def __init__(self, num_classes: int, generator: torch.Generator):
        angle = self._angles()
        num_corners = torch.randint(3, 9, (num_classes,), generator=generator)
        corners = uniform((num_classes, 8), 0.35, 1.0, generator)
        # Corner radii repeat with the number of corners, so the profile closes where it began.
        position = angle / (2 * math.pi) * num_corners[:, None]
        left = position.long()
        near, far = (corners.gather(1, (left + side) % num_corners[:, None]) for side in (0, 1))
        smooth = torch.randint(0, 2, (num_classes, 1), generator=generator).bool()
        t = torch.where(smooth, 0.5 - 0.5 * (math.pi * position.frac()).cos(), position.frac())
        self.radius = near + t * (far - near)
        self.filled = torch.rand(num_classes, generator=generator) < 0.3

    @staticmethod
    def _angles() -> torch.Tensor:
        return torch.arange(POINTS) * (2 * math.pi / POINTS)

    def __len__(self) -> int:
        return len(self.radius)

    def points(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw one perturbed instance per class index (B,) as points (B, P, 2)."""
        angle = self._angles()
        waves = torch.stack([wave(k * angle) for k in (1, 2, 3) for wave in (torch.sin, torch.cos)])
        radius = self.radius[index] * (1 + 0.06 * torch.randn((len(index), 6), generator=generator) @ waves)
        depth = uniform(radius.shape, 0.0, 1.0, generator).sqrt()  # the root spreads points evenly over the area
        radius = torch.where(self.filled[index][:, None], radius * depth, radius)
        return radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)


class DrawnClasses:
    """A fixed set of classes, and the means to draw fresh instances of them.

    Args:
        num_fractals, num_glyphs, num_contours: classes of each family; labels count through them in this order.
        seed: fixes what the classes are. What the instances are is up to the generator given to `draw`.
    """

    def __init__(self, num_fractals: int = 500, num_glyphs: int = 0, num_contours: int = 300, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.families = (
            Fractals(num_fractals, generator),
            Glyphs(num_glyphs, generator),
            Contours(num_contours, generator),
        )
        self.resample = torch.stack([self._resampling(size) for size in RESOLUTIONS])

    def __len__(self) -> int:
        return sum(len(family) for family in self.families)

    @staticmethod
    def _resampling(size: int) -> torch.Tensor:
        """The linear map (32, 32) that shrinks one axis to `size` pixels and enlarges it again."""
        small = F.adaptive_avg_pool1d(torch.eye(IMAGE_SIZE)[None], size)
        return F.interpolate(small, IMAGE_SIZE, mode="linear")[0].T

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw one instance for each label (B,), as images (B, 3, 32, 32) with values in [0, 1]."""
        points, first = torch.empty(len(labels), POINTS, 2), 0
        for family in self.families:
            (rows,) = ((labels >= first) & (labels < first + len(family))).nonzero(as_tuple=True)
            points[rows] = fit_to_square(family.points(labels[rows] - first, generator))
            first += len(family)
        return self._colour(self._ink(self._pose(points, generator), generator), generator)

    def _pose(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Rotate, scale, shear and shift the clouds (B, P, 2), then go from [-1, 1] to pixel coordinates."""
        num = len(points)
        angle = uniform((num,), -math.pi / 10, math.pi / 10, generator)
        scale = torch.diag_embed(uniform((num, 1), 0.65, 0.95, generator) * uniform((num, 2), 0.75, 1.05, generator))
        scale[:, 0, 1] = uniform((num,), -0.2, 0.2, generator)
        points = points @ (rotation(angle) @ scale).mT + uniform((num, 1, 2), -0.12, 0.12, generator)
        return (points + 1) * (IMAGE_SIZE / 2) - 0.5

    def _ink(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Splat points in pixel coordinates (B, P, 2) to ink (B, 32, 32) in [0, 1]."""
        num, grid = len(points), torch.arange(IMAGE_SIZE)
        # A Gaussian is separable, so splatting with any stroke width is one batched product of (32, P) and (P, 32).
        width = uniform((num, 1, 1), 0.5, 1.3, generator)
        column, row = (torch.exp(-0.5 * ((grid - points[..., axis, None]) / width) ** 2) for axis in (0, 1))
        resample = self.resample[torch.randint(len(RESOLUTIONS), (num,), generator=generator)]
        ink = resample @ (row.mT @ column) @ resample.mT
        # The typical density under the ink, not its peak: a crossing must not make the rest of a stroke fade.
        typical = ink.square().sum((1, 2), keepdim=True) / ink.sum((1, 2), keepdim=True).clamp(min=1e-6)
        return (ink / typical * uniform((num, 1, 1), 0.9, 1.5, generator)).clamp(0, 1)

    def _colour(self, ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Give ink (B, 32, 32) a foreground, a background and noise; half of the images stay grey."""
        num = len(ink)
        dark = uniform((num, 3, 1, 1), 0.0, 0.4, generator)
        light = uniform((num, 3, 1, 1), 0.6, 1.0, generator)
        grey = torch.rand((num, 1, 1, 1), generator=generator) < 0.5
        dark, light = torch.where(grey, dark[:, :1] / 2, dark), torch.where(grey, 1 - (1 - light[:, :1]) / 2, light)
        inverted = torch.rand((num, 1, 1, 1), generator=generator) < 0.3
        back, front = torch.where(inverted, light, dark), torch.where(inverted, dark, light)
        noise = torch.randn((num, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
        noise = noise * uniform((num, 1, 1, 1), -0.05, 0.08, generator).clamp(min=0)
        return (back + ink[:, None] * (front - back) + noise).clamp(0, 1)
