"""Draws pedestrians as six cameras would see them, for the demo data set; every choice comes from the
generator given.

A person is a combination of local attributes (shirt and its pattern, sleeves, trousers, bag, hair or hat,
shoes, build) in colours from one small palette, so that many people share every colour. Cameras add light
(gain, cast, gamma), angle, scale and background; images add pose, occlusion, blur and noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 64, 128
_W, _H = 2 * WIDTH, 2 * HEIGHT  # drawn at twice the size, then reduced
_FOOT, _TALL = 248.0, 236.0  # the soles' line and the tallest person, in pixels

Colour = tuple[int, int, int]
Point = tuple[float, float]
# fmt: off
PALETTE: tuple[Colour, ...] = (
    (28, 28, 34), (228, 226, 220), (126, 128, 132), (186, 36, 42), (38, 70, 160),
    (44, 122, 66), (222, 184, 48), (112, 70, 42), (232, 126, 40), (128, 58, 140))
SKIN: tuple[Colour, ...] = ((236, 196, 168), (204, 152, 116), (150, 102, 72), (96, 64, 46))
HAIR: tuple[Colour, ...] = ((24, 20, 18), (82, 54, 34), (196, 158, 92), (140, 140, 140), (130, 56, 30))
PATTERNS = ("plain", "stripes", "bars", "checks", "dots", "halves", "sash", "band", "logo", "vest")
SCENES: dict[str, tuple[Colour, Colour]] = {  # colours of wall and floor
    "street": ((158, 162, 170), (120, 118, 116)), "bricks": ((150, 92, 74), (132, 124, 112)),
    "corridor": ((204, 206, 200), (150, 148, 140)), "fence": ((120, 140, 160), (104, 100, 92)),
    "grass": ((132, 150, 140), (86, 124, 62)), "plaza": ((176, 170, 156), (190, 182, 166))}


class Camera(NamedTuple):
    """What one camera does to every image; tilt > 0 looks from above (perspective: small feet)."""
    gain: tuple[float, float, float]
    gamma: float
    contrast: float
    scale: float
    foreshortening: float
    shear: float
    tilt: float
    blur: float
    noise: float
    background: str


# Set by hand, so that the six really differ: daylight, warm lamp, cold corridor, shade, dusk, haze.
CAMERAS = (
    Camera((1.03, 1.02, 0.98), 0.97, 1.05, 1.00, 1.00, 0.00, 0.04, 0.3, 3, "street"),
    Camera((1.10, 1.00, 0.86), 1.06, 1.00, 0.96, 0.98, 0.03, 0.12, 0.4, 4, "bricks"),
    Camera((0.90, 0.98, 1.10), 1.00, 0.95, 1.05, 0.95, -0.03, 0.18, 0.4, 4, "corridor"),
    Camera((0.80, 0.82, 0.86), 1.15, 1.05, 1.00, 1.00, 0.02, -0.04, 0.5, 5, "fence"),
    Camera((0.92, 0.84, 0.90), 0.95, 0.92, 0.93, 0.98, -0.04, 0.08, 0.6, 6, "grass"),
    Camera((1.04, 1.10, 1.03), 0.85, 0.82, 1.08, 0.92, 0.00, 0.22, 0.6, 4, "plaza"))


class Person(NamedTuple):
    """What stays the same in all images of an identity."""
    height: float
    width: float
    skin: Colour
    hair: Colour
    head: str
    hat: Colour
    shirt: Colour
    shirt2: Colour
    pattern: str
    sleeves: str
    legs: str
    trousers: Colour
    trousers2: Colour
    shoes: Colour
    bag: str
    bag_colour: Colour


def draw_person(rng: np.random.Generator) -> Person:
    """A random person."""
    shirt, trousers = ([PALETTE[i] for i in rng.choice(len(PALETTE), 2, replace=False)] for _ in range(2))
    return Person(
        rng.uniform(0.88, 1.0), rng.uniform(0.85, 1.2), _choice(rng, SKIN), _choice(rng, HAIR),
        _choice(rng, ("short", "long", "bald", "cap", "beanie")), _choice(rng, PALETTE),
        shirt[0], shirt[1], _choice(rng, PATTERNS), _choice(rng, ("long", "short", "second colour")),
        _choice(rng, ("trousers", "trousers", "shorts", "skirt", "striped")), trousers[0], trousers[1],
        _choice(rng, PALETTE), _choice(rng, ("none", "backpack", "shoulder", "handbag", "suitcase")),
        _choice(rng, PALETTE))
# fmt: on


def _choice(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(v * factor)) for v in colour)
    return r, g, b


def _cloth(person: Person, front: bool) -> Image.Image:
    """The shirt, 96 × 120 pixels, collar at the top centre; a logo or vest shows at the front only."""
    w, h, c, kind, second = 96, 120, 48, person.pattern, person.shirt2
    cloth = Image.new("RGB", (w, h), person.shirt)
    draw = ImageDraw.Draw(cloth)
    for y in range(6, h, 20) if kind in ("stripes", "checks") else ():
        draw.rectangle((0, y, w, y + 8), fill=second)
    for x in range(4, w, 16) if kind in ("bars", "checks") else ():
        draw.rectangle((x, 0, x + 6, h), fill=second)
    for row, y in enumerate(range(4, h, 14) if kind == "dots" else ()):
        for x in range(-8 + 8 * (row % 2), w, 16):
            draw.ellipse((x, y, x + 8, y + 8), fill=second)
    if kind in ("halves", "band"):
        draw.rectangle((0, 46, w, h) if kind == "halves" else (0, 28, w, 54), fill=second)
    elif kind == "sash":
        draw.line((c - 40, 0, c + 40, 96), fill=second, width=18)
    elif kind == "logo" and front:
        draw.ellipse((c - 15, 22, c + 15, 52), fill=second)
    elif kind == "logo":
        draw.rectangle((c - 22, 20, c + 22, 34), fill=second)
    elif kind == "vest" and front:
        draw.polygon(((c - 14, 0), (c + 14, 0), (c + 7, h), (c - 7, h)), fill=second)
    return cloth


class _Body:
    """A pen in body coordinates: x in body heights from the middle, y from 0 (crown) to 1 (soles)."""

    def __init__(self, tall: float, bob: float) -> None:
        self.canvas = Image.new("RGBA", (_W, _H), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.canvas)
        self.tall, self.bob = tall, bob

    def px(self, *points: Point) -> list[Point]:
        return [(_W / 2 + x * self.tall, _FOOT - (1 - y) * self.tall - self.bob) for x, y in points]

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0) -> None:
        self.draw.rounded_rectangle(self.px((min(x0, x1), y0), (max(x0, x1), y1)), radius, fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.draw.ellipse(self.px((x - rx, y - ry), (x + rx, y + ry)), fill=colour)

    def line(self, a: Point, b: Point, thick: float, colour: Colour) -> None:
        self.draw.line(self.px(a, b), fill=colour, width=max(2, round(thick * self.tall)))

    def bone(self, a: Point, b: Point, thick: float, colour: Colour) -> None:
        self.line(a, b, thick, colour)
        for x, y in (a, b):
            self.oval(x, y, thick / 2, thick / 2, colour)


def draw_figure(who: Person, facing: int, phase: float, stride: float) -> Image.Image:
    """One pedestrian, RGBA on a transparent canvas of 128 × 256 pixels.

    facing: 0 front, 1 back, 2 left, 3 right; phase in radians and stride (0 stands still) give the step.
    """
    side, turn, bag = facing >= 2, (-1 if facing == 2 else 1), who.bag_colour
    tall = _TALL * who.height
    body = _Body(tall, 0.012 * tall * abs(math.sin(phase)) * stride)
    wide = 1.18 * who.width * (0.72 if side else 1.0)
    shoulder, hip, arm_thick, leg_thick = 0.104 * wide, 0.086 * wide, 0.055 * who.width, 0.078 * who.width
    swing = stride * math.sin(phase)

    def at(start: Point, angle: float, length: float) -> Point:
        return start[0] + math.sin(angle) * length, start[1] + math.cos(angle) * length

    def leg(sign: int, light: float) -> None:
        ahead = max(0.0, sign * swing)
        angle = turn * sign * swing * 0.5 if side else sign * 0.04
        bend, lift = (-turn * max(0.0, -sign * swing) * 0.5, 0.0) if side else (0.0, 0.025 * ahead)
        root = (0.0 if side else sign * hip * 0.55, 0.53)
        knee = at(root, angle, 0.22 - lift)
        ankle = at(knee, angle + bend, 0.21 - lift)
        cloth = _shade(who.trousers, light)
        bare = who.legs in ("shorts", "skirt")
        body.bone(knee, ankle, leg_thick * 0.85, _shade(who.skin, light) if bare else cloth)
        body.bone(root, knee, leg_thick, cloth)
        if who.legs == "striped":
            body.line(root, knee, leg_thick * 0.45, _shade(who.trousers2, light))
            body.line(knee, ankle, leg_thick * 0.45, _shade(who.trousers2, light))
        heel = (ankle[0], ankle[1] + 0.012)
        toe = (heel[0] + (turn * 0.05 if side else sign * 0.012), heel[1])
        body.bone(heel, toe, 0.045, _shade(who.shoes, light))

    def arm(sign: int, light: float) -> Point:
        angle = -turn * sign * swing * 0.45 if side else sign * 0.1 + 0.1 * swing
        root = (0.0 if side else sign * (shoulder + arm_thick * 0.1), 0.195)
        elbow = at(root, angle, 0.16)
        hand = at(elbow, angle + (turn * 0.25 if side else -sign * 0.1), 0.15)
        skin = _shade(who.skin, light)
        sleeve = _shade(who.shirt2 if who.sleeves == "second colour" else who.shirt, light)
        body.bone(elbow, hand, arm_thick * 0.8, skin if who.sleeves == "short" else sleeve)
        body.bone(root, elbow, arm_thick, sleeve)
        body.bone(hand, at(hand, angle, 0.02), arm_thick * 0.75, skin)
        return hand

    if who.bag == "suitcase":
        body.line((-turn * 0.2, 0.55), (-turn * 0.2, 0.72), 0.014, _shade(bag, 0.6))
        body.box(-turn * 0.14, 0.72, -turn * 0.26, 0.98, bag)
    leg(-1, 0.8)
    leg(1, 1.0)
    far_hand = arm(-1, 0.8)
    if who.legs == "skirt":
        skirt = body.px((-hip, 0.5), (hip, 0.5), (1.5 * hip, 0.74), (-1.5 * hip, 0.74))
        body.draw.polygon(skirt, fill=who.trousers)
    if who.bag == "backpack" and side:
        back = -turn * (shoulder + 0.02)
        body.box(back - 0.07, 0.18, back + 0.07, 0.43, bag, 8)
    # The torso: cloth pasted through its outline.
    half = [(hip * 1.02, 0.545), (shoulder, 0.19), (0.85 * shoulder, 0.17), (0.35 * shoulder, 0.145)]
    mask, cloth = Image.new("L", (_W, _H)), Image.new("RGB", (_W, _H))
    ImageDraw.Draw(mask).polygon(body.px(*half, *((-x, y) for x, y in reversed(half))), fill=255)
    cloth.paste(_cloth(who, facing != 1), (_W // 2 - 48, int(body.px((0.0, 0.14))[0][1])))
    body.canvas.paste(cloth, (0, 0), mask)
    # The head: long hair behind, face, then hair or hat.
    x, y, rx, ry = (turn * 0.012 if side else 0.0), 0.072, 0.046, 0.062
    hairy = who.head in ("short", "long")
    top = who.hair if hairy else who.hat
    body.box(-0.022, 0.11, 0.022, 0.16, _shade(who.skin, 0.85))
    if who.head == "long":
        body.box(x - rx * 1.25, 0.02, x + rx * 1.25, 0.215, who.hair, 10)
    body.oval(x, y, rx, ry, who.skin)
    crown = body.px((x - rx * 1.1, y - ry * 1.1), (x + rx * 1.1, y + ry * 0.9))
    if facing == 1 and hairy:
        body.oval(x, y, rx * 1.1, ry * 1.08, top)
    elif who.head != "bald":
        body.draw.pieslice(crown, 175, 365, fill=top)
        if side and hairy:
            body.draw.pieslice(crown, 90 * turn, 90 * turn + 180, fill=top)
    if who.head == "cap" and facing != 1:
        left, right = (0.0, turn * rx * 1.9) if side else (-rx * 1.2, rx * 1.2)
        body.box(x + left, y - ry * 0.25, x + right, y - ry * 0.02, _shade(top, 0.8))
    elif who.head == "beanie":
        body.box(x - rx * 1.1, y - ry * 0.35, x + rx * 1.1, y, _shade(top, 0.75))
    if who.bag == "backpack" and facing == 1:
        body.box(-0.085, 0.18, 0.085, 0.44, bag, 10)
        body.box(-0.05, 0.33, 0.05, 0.40, _shade(bag, 0.7))
    elif who.bag == "backpack" and facing == 0:
        for strap in (-0.6 * shoulder, 0.6 * shoulder):
            body.line((strap, 0.155), (strap, 0.38), 0.03, bag)
    elif who.bag == "shoulder":
        body.line((-0.8 * shoulder, 0.16), (hip, 0.5), 0.026, _shade(bag, 0.85))
        body.box(hip - 0.05, 0.47, hip + 0.07, 0.6, bag, 5)
    near_hand = arm(1, 0.95)
    if who.bag == "handbag":
        x, y = far_hand if facing == 2 else near_hand
        body.box(x - 0.05, y + 0.03, x + 0.05, y + 0.14, bag)
        body.draw.arc(body.px((x - 0.03, y - 0.02), (x + 0.03, y + 0.08)), 180, 360, fill=bag, width=3)
    return body.canvas


@lru_cache(maxsize=len(CAMERAS))
def _scene(camera: int) -> Image.Image:
    """All that a camera looks at, 512 × 320 pixels; images show parts of it. The same for every seed."""
    rng, w, h, horizon, kind = np.random.default_rng([77, camera]), 512, 320, 130, CAMERAS[camera].background
    wall, floor = SCENES[kind]
    scene = Image.new("RGB", (w, h), wall)
    draw = ImageDraw.Draw(scene)
    if kind == "bricks":
        for row, y in enumerate(range(0, horizon, 10)):
            for x in range(-12 * (row % 2), w, 24):
                draw.rectangle((x, y, x + 22, y + 8), fill=_shade(wall, rng.uniform(0.75, 1.15)))
    for _ in range(0 if kind == "bricks" else 26):  # windows, doors, posts
        x, y = int(rng.integers(0, w)), int(rng.integers(-40, horizon - 20))
        base = _choice(rng, PALETTE) if rng.random() < 0.12 else wall
        draw.rectangle((x, y, x + int(rng.integers(8, 44)), y + int(rng.integers(20, 110))),
                       fill=_shade(base, rng.uniform(0.6, 1.15)))  # fmt: skip
    draw.rectangle((0, horizon, w, h), fill=floor)
    if kind in ("plaza", "corridor", "street"):  # paving
        for i in range(-20, 20):
            ends = (w / 2 + i * 24, horizon, w / 2 + i * 90, h)
            draw.line(ends, fill=_shade(floor, 0.82), width=2)
            draw.line((0, horizon + i * i * 4, w, horizon + i * i * 4), fill=_shade(floor, 0.85), width=2)
    for _ in range(900 if kind in ("bricks", "fence", "grass") else 0):  # tufts
        x, y = int(rng.integers(0, w)), int(rng.integers(horizon, h))
        draw.line((x, y, x + int(rng.integers(2, 7)), y - 3), fill=_shade(floor, rng.uniform(0.7, 1.25)))
    for x in range(0, w if kind == "fence" else 0, 18):
        draw.line((x, 60, x, horizon + 30), fill=(60, 62, 66), width=4)
    return scene.filter(ImageFilter.GaussianBlur(2.0))


def _view(figure: Image.Image, camera: Camera, scale: float, dx: float, dy: float) -> Image.Image:
    """The figure as the camera sees it: a homography about the feet, moved by (dx, dy) pixels."""
    tall = camera.scale * scale
    # The perspective magnifies the head's end: undo that on the whole, so that tall × foreshortening is the
    # height.
    rise = camera.tilt * tall * camera.foreshortening * 224 / _H
    sx, sy = (1 + rise / 2) / tall, (1 + rise) / (tall * camera.foreshortening)
    to_feet = np.array([[1, 0, -_W / 2 - dx], [0, 1, -_FOOT - dy], [0, 0, 1]])
    view = np.array([[sx, camera.shear, 0], [0, sy, 0], [0, -camera.tilt / _H, 1]])
    matrix = np.array([[1, 0, _W / 2], [0, 1, _FOOT], [0, 0, 1]]) @ view @ to_feet  # output to input pixels
    numbers = (matrix / matrix[2, 2]).flatten().tolist()[:8]
    return figure.transform(figure.size, Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BILINEAR)


def draw_image(
    person: Person | None, camera_index: int, facing: int, rng: np.random.Generator
) -> Image.Image:
    """One 64 × 128 RGB image by camera 0-5; person None draws junk: an empty or badly cut box."""
    camera = CAMERAS[camera_index]
    x, y = int(rng.integers(0, 512 - _W)), int(rng.integers(0, 320 - _H))
    image = _scene(camera_index).crop((x, y, x + _W, y + _H))
    draw = ImageDraw.Draw(image)

    def add(who: Person, face: int, scale: float, dx: float, dy: float) -> None:
        figure = draw_figure(who, face, rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 1.0))
        figure = _view(figure, camera, scale, dx, dy)
        image.paste(figure, (0, 0), figure)

    def add_stranger(scale: float, dx: float, dy: float) -> None:
        add(draw_person(rng), int(rng.integers(4)), scale, float(rng.choice((-1, 1))) * dx, dy)

    if rng.random() < 0.1:
        add_stranger(rng.uniform(0.5, 0.8), rng.uniform(35, 60), rng.uniform(-50, -10))
    if person is not None:
        add(person, facing, rng.uniform(0.94, 1.05), rng.uniform(-6, 6), rng.uniform(-5, 5))
    elif rng.random() < 0.6:
        add_stranger(rng.uniform(1.0, 1.8), rng.uniform(40, 75), rng.uniform(40, 150))
    hidden = rng.random()
    if hidden < 0.04:  # by a pole
        x0 = rng.uniform(20, _W - 20)
        colour = _shade((100, 100, 104), rng.uniform(0.5, 1.4))
        draw.rectangle((x0, 0, x0 + rng.uniform(8, 16), _H), fill=colour)
    elif hidden < 0.08:  # by a car: no legs
        top, colour = _H * rng.uniform(0.62, 0.82), _shade(_choice(rng, PALETTE), rng.uniform(0.7, 1.1))
        draw.rounded_rectangle((-20, top, _W + 20, _H + 40), 24, fill=colour)
        draw.rectangle((0, top + 16, _W, top + 20), fill=(40, 40, 44))
    elif hidden < 0.12:  # by somebody in front
        add_stranger(rng.uniform(0.95, 1.15), rng.uniform(46, 66), rng.uniform(0, 16))
    blur = min(camera.blur + rng.exponential(0.25), 1.8)
    light = np.asarray(image.reduce(2).filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64) / 255
    # Exposure and colour vary from image to image around the camera's own.
    gain = np.asarray(camera.gain) * rng.normal(1.0, 0.03, 3) * np.exp(rng.normal(0, 0.10))
    ramp = 1 + rng.normal(0, 0.06) * np.linspace(-1, 1, HEIGHT)[:, None, None]
    light = 0.5 + camera.contrast * (np.clip(light * gain * ramp, 0, 1) ** camera.gamma - 0.5)
    light = light * 255 + rng.normal(0, camera.noise, light.shape)
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
