"""The endoscopic phantom: paired WLI and NBI frames rendered from one hidden scene.

A scene is a set of maps: blood in a superficial and a deep layer, pigment, height and light. It is
rendered twice by the Beer-Lambert law: through broad bands of white light (WLI), and through 415
and 540 nm (NBI). Haemoglobin absorbs most at 415 nm, which does not reach deep: superficial
capillaries stand out in NBI and are faint in WLI. The pigments absorb between and beyond the two
narrow bands, so they are invisible in NBI.

Six classes, two that differ in colour (WLI only), two in capillaries (NBI only), two in both:

    plaque-yellow, plaque-green      a flat patch of pigment
    flat-mesh, flat-tortuous         a flat patch of regular fine, or of few thick winding, vessels
    bump-diffuse, bump-rim           a bump, red all over, or with a pale centre and a red rim

Position, size and shape of the lesion, lighting, white balance, base colour, stains, folds, deep
vessels, defocus and noise vary between scenes. Scene i is a function of (seed, i) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 96
CLASSES = (
    "plaque-yellow", "plaque-green", "flat-mesh", "flat-tortuous", "bump-diffuse", "bump-rim",
)  # fmt: skip

# Columns: 415, 450, 480, 510, 540, 560, 580, 610 and 640 nm. Absorption of haemoglobin relative to
# that at 540 nm (after the tabulated oxyhaemoglobin spectrum), and how far light reaches: its path
# in the superficial and deep layer.
_BLOOD = np.array([9.0, 1.2, 0.5, 0.4, 1.0, 0.65, 0.95, 0.06, 0.02])
_SUPERFICIAL = np.array([1.0, 0.75, 0.65, 0.6, 0.55, 0.5, 0.5, 0.45, 0.4])
_DEEP = np.array([0.02, 0.25, 0.4, 0.45, 0.5, 0.6, 0.7, 1.0, 1.2])
_YELLOW = np.array([0.0, 1.0, 1.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0])
_GREEN = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 1.0, 1.0])
# Sensor responses (rows: red, green, blue); NBI shows 540 nm as red, 415 nm as green and blue.
_WLI = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.4],
        [0, 0, 0.05, 0.25, 0.35, 0.25, 0.1, 0, 0],
        [0.08, 0.5, 0.37, 0.05, 0, 0, 0, 0, 0],
    ]
)
_NBI = np.array(
    [[0, 0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    dtype=float,
)

_axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
_Y, _X = np.meshgrid(_axis, _axis, indexing="ij")
_FREQUENCY = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]) * SIDE


@dataclass(frozen=True)
class Scene:
    """The hidden scene; all maps are (SIDE, SIDE).

    Args:
        label: index into ``CLASSES``.
        lesion: coverage in [0, 1].
        superficial, deep: blood in the two layers.
        yellow, green: pigments.
        light: irradiance times surface shading.
        glare: specular reflection, added to every channel.
    """

    label: int
    lesion: np.ndarray
    superficial: np.ndarray
    deep: np.ndarray
    yellow: np.ndarray
    green: np.ndarray
    light: np.ndarray
    glare: np.ndarray


def render_pair(seed: int, index: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Render one pair of frames.

    Returns:
        Class name, WLI and NBI image, each (SIDE, SIDE, 3) uint8.

    Args:
        seed: of the data set.
        index: number of the pair; its class is ``CLASSES[index % 6]``.
    """
    rng = np.random.default_rng([seed, index])
    scene = make_scene(rng, index % len(CLASSES))
    return CLASSES[scene.label], _expose(rng, scene, _WLI), _expose(rng, scene, _NBI)


def make_scene(rng: np.random.Generator, label: int) -> Scene:
    """Draw a random scene of a class."""
    distance, angle, radius = _lesion_shape(rng)
    lesion = _sigmoid((1 - distance) * radius / 0.05)
    yellow, green = 0.12 * _cloud(rng, 4) ** 2, 0.12 * _cloud(rng, 4) ** 2
    superficial = rng.uniform(0.1, 0.2) * np.exp(0.2 * _cloud(rng, 3))
    superficial += 0.10 * _vessels(rng, scale=7, width=0.12)
    deep = rng.uniform(0.9, 1.5) * np.exp(0.3 * _cloud(rng, 2))
    deep += 1.2 * _vessels(rng, scale=2.2, width=0.14)
    height = 0.025 * _folds(rng)
    strength = rng.uniform(0.8, 1.2)
    name = CLASSES[label]
    if name.startswith("plaque"):
        pigment = 0.8 * strength * lesion * np.exp(0.2 * _cloud(rng, 6))
        yellow, green = (
            (yellow + pigment, green) if name == "plaque-yellow" else (yellow, green + pigment)
        )
    elif name == "flat-mesh":
        superficial += 0.24 * strength * lesion * _mesh(rng)
    elif name == "flat-tortuous":
        superficial += 0.28 * strength * lesion * _vessels(rng, scale=5, width=0.30)
    else:
        height += 0.12 * np.exp(-1.5 * distance**2)
        if name == "bump-diffuse":
            redness = lesion * np.exp(0.3 * _cloud(rng, 5))
            superficial += 0.14 * strength * redness
            deep += 2.5 * strength * redness
        else:
            rim = lesion * _sigmoid((distance - 0.7) / 0.06)
            rays = 0.5 + 0.5 * np.cos(rng.integers(9, 14) * angle + 2 * _cloud(rng, 3))
            superficial += strength * rim * (0.16 + 0.22 * rays) - 0.06 * (lesion - rim)
            superficial = superficial.clip(0.02)
            deep += strength * (2.6 * rim - 0.5 * (lesion - rim))
    light, glare = _lighting(rng, height)
    return Scene(label, lesion, superficial, deep, yellow, green, light, glare)


def _expose(rng: np.random.Generator, scene: Scene, response: np.ndarray) -> np.ndarray:
    """Render the scene through a sensor: (SIDE, SIDE, 3) uint8."""
    used = response.any(0)
    blood = _BLOOD[used, None, None]
    path = _SUPERFICIAL[used, None, None] * scene.superficial + _DEEP[used, None, None] * scene.deep
    density = blood * path * 0.6
    density += _YELLOW[used, None, None] * scene.yellow + _GREEN[used, None, None] * scene.green
    linear = np.tensordot(response[:, used], np.exp(-density), axes=1)
    balance = np.exp(rng.normal(0, 0.2, 3))[:, None, None]
    linear = linear * balance * scene.light * np.exp(rng.normal(0, 0.1)) + scene.glare
    linear = _blur(linear, rng.uniform(0.2, 0.9))
    srgb = 255 * linear.clip(0, 1) ** (1 / 2.2)
    noisy = srgb + rng.uniform(2, 6) * rng.standard_normal(srgb.shape)
    visible = _sigmoid((1.12 - np.hypot(_X, _Y)) / 0.02)
    return (noisy * visible).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _lesion_shape(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw the lesion's outline: distance from its centre in units of the radius, angle, mean
    radius."""
    x, y = _X - rng.uniform(-0.35, 0.35), _Y - rng.uniform(-0.35, 0.35)
    radius = rng.uniform(0.32, 0.5)
    angle = np.arctan2(y, x)
    outline = np.ones_like(angle)
    for wave in (2, 3, 5):
        outline = outline + rng.normal(0, 0.3 / wave) * np.cos(wave * angle + rng.uniform(0, 6.28))
    return np.hypot(x, y) / (radius * np.clip(outline, 0.6, 1.5)), angle, radius


def _lighting(rng: np.random.Generator, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return irradiance times Lambert shading, and the glare of specular reflection."""
    lamp = rng.uniform(-0.4, 0.4, 2)
    slope_y, slope_x = np.gradient(height, 2 / SIDE)
    tilt = rng.normal(0, 0.15, 2)
    slope_x, slope_y = slope_x + tilt[0], slope_y + tilt[1]
    norm = np.sqrt(1 + slope_x**2 + slope_y**2)
    toward_x, toward_y = lamp[0] - _X, lamp[1] - _Y
    distance = np.sqrt(1.2 + toward_x**2 + toward_y**2)
    cosine = (1.1 - slope_x * toward_x - slope_y * toward_y) / (norm * distance)
    light = rng.uniform(0.75, 1.15) * 1.5 * cosine.clip(0.05) / distance**2
    shine = (_cloud(rng, 12) + 3 * (cosine - 0.93)).clip(0)
    return light, 0.5 * _sigmoid((shine - 2.3) / 0.08)


def _folds(rng: np.random.Generator) -> np.ndarray:
    """Draw the height of a few winding folds."""
    direction = rng.uniform(0, np.pi)
    along = np.cos(direction) * _X + np.sin(direction) * _Y + 0.25 * _cloud(rng, 1.5)
    return np.abs(np.sin(rng.uniform(2.5, 4.5) * along + rng.uniform(0, 6.28))) * 2


def _mesh(rng: np.random.Generator) -> np.ndarray:
    """Draw a regular honeycomb of fine capillaries, 6 to 8 pixels wide, slightly warped."""
    frequency = 2 * np.pi * SIDE / 2 / rng.uniform(6, 8)
    turn = rng.uniform(0, np.pi)
    x, y = _X + 0.015 * _cloud(rng, 3), _Y + 0.015 * _cloud(rng, 3)
    waves = sum(
        np.cos(frequency * (np.cos(turn + k * np.pi / 3) * x + np.sin(turn + k * np.pi / 3) * y))
        for k in range(3)
    )
    return np.exp(-(((waves + 1.5) / 0.9) ** 2)) * 1.2


def _vessels(rng: np.random.Generator, scale: float, width: float) -> np.ndarray:
    """Draw a net of winding vessels: the zero lines of a smooth random map of a given scale."""
    level = _cloud(rng, scale)
    return np.exp(-((level / width) ** 2))


def _cloud(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Draw a smooth random map of mean 0 and variance 1 with about ``scale`` waves across."""
    band = np.exp(-(((_FREQUENCY - scale) / (0.5 * scale)) ** 2))
    spectrum = band * np.fft.rfft2(rng.standard_normal((SIDE, SIDE)))
    spectrum[0, 0] = 0
    cloud = np.fft.irfft2(spectrum, (SIDE, SIDE))
    return cloud / cloud.std()


def _blur(channels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (3, SIDE, SIDE) channels by a Gaussian of ``sigma`` pixels."""
    transfer = np.exp(-2 * (np.pi * sigma * _FREQUENCY / SIDE) ** 2)
    return np.fft.irfft2(np.fft.rfft2(channels) * transfer, channels.shape[1:])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.clip(-50, 50)))
