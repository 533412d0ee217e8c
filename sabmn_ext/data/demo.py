"""The built-in demo data set: pedestrians drawn by this file, in Market-1501's folders and file names.

A person is a combination of local attributes (shirt colour and pattern, sleeves, trousers, bag, hair or hat, shoes,
build) whose colours come from one small palette, so that many people share every colour. Six cameras add their own
light (gain, cast, gamma), angle, scale and background; images add pose, occlusion, blur, noise and JPEG.
Every random choice comes from a generator seeded by what is drawn (seed, person, camera, index), never by order.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from .records import ImageRecord, ReidData

DRAWING_VERSION = 1  # raise it when a picture changes: the cache is keyed by it
NUM_PEOPLE, IMAGES_PER_VISIT, CAMERAS_PER_PERSON, NUM_CAMERAS = 160, 3, 4, 6  # every fourth person is for testing
NUM_DISTRACTORS, NUM_JUNK = 48, 32
WIDTH, HEIGHT = 64, 128
_W, _H = 2 * WIDTH, 2 * HEIGHT  # drawn at twice the size, then reduced

Colour = tuple[int, int, int]
Point = tuple[float, float]
PALETTE: tuple[Colour, ...] = (
    (28, 28, 34), (228, 226, 220), (126, 128, 132), (186, 36, 42), (38, 70, 160), (44, 122, 66), (222, 184, 48),
    (112, 70, 42), (232, 126, 40), (128, 58, 140),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((236, 196, 168), (204, 152, 116), (150, 102, 72), (96, 64, 46))
HAIR: tuple[Colour, ...] = ((24, 20, 18), (82, 54, 34), (196, 158, 92), (140, 140, 140), (130, 56, 30))
PATTERNS = ("plain", "stripes", "bars", "checks", "dots", "halves", "sash", "band", "logo", "vest")
BAGS = ("none", "backpack", "shoulder", "handbag", "suitcase")


class Person(NamedTuple):
    """Who somebody is: everything that stays the same in all images of an identity."""

    height: float
    width: float
    skin: Colour
    hair: Colour
    head: str  # short, long, bald, cap, beanie
    hat: Colour
    shirt: Colour
    shirt2: Colour
    pattern: str
    sleeves: str  # long, short, second (long, in the second colour)
    legs: str  # trousers, shorts, skirt, striped
    trousers: Colour
    trousers2: Colour
    shoes: Colour
    bag: str
    bag_colour: Colour


class Camera(NamedTuple):
    """What one camera does to every image that it takes."""

    gain: tuple[float, float, float]
    gamma: float
    contrast: float
    scale: float
    foreshortening: float
    shear: float
    tilt: float  # perspective: > 0 makes the feet small, as from above
    blur: float
    noise: float
    quality: int
    background: str


# Fixed by hand, so that the six really differ: daylight, warm lamp, cold corridor, backlight, dusk, haze.
CAMERAS = (
    Camera((1.03, 1.02, 0.98), 0.97, 1.05, 1.00, 1.00, 0.00, 0.04, 0.3, 3, 92, "street"),
    Camera((1.10, 1.00, 0.86), 1.06, 1.00, 0.96, 0.98, 0.03, 0.12, 0.4, 4, 82, "bricks"),
    Camera((0.90, 0.98, 1.10), 1.00, 0.95, 1.05, 0.95, -0.03, 0.18, 0.4, 4, 85, "corridor"),
    Camera((0.80, 0.82, 0.86), 1.15, 1.05, 1.00, 1.00, 0.02, -0.04, 0.5, 5, 78, "fence"),
    Camera((0.92, 0.84, 0.90), 0.95, 0.92, 0.93, 0.98, -0.04, 0.08, 0.6, 6, 75, "grass"),
    Camera((1.04, 1.10, 1.03), 0.85, 0.82, 1.08, 0.92, 0.00, 0.22, 0.6, 4, 82, "plaza"),
)


def _choice(rng: np.random.Generator, options: Sequence[Any], p: Sequence[float] | None = None) -> Any:
    return options[int(rng.choice(len(options), p=p))]


def draw_attributes(rng: np.random.Generator) -> Person:
    """A random person."""
    shirt, shirt2 = (PALETTE[i] for i in rng.choice(len(PALETTE), 2, replace=False))
    trousers, trousers2 = (PALETTE[i] for i in rng.choice(len(PALETTE), 2, replace=False))
    return Person(
        height=rng.uniform(0.88, 1.0), width=rng.uniform(0.85, 1.2),
        skin=_choice(rng, SKIN), hair=_choice(rng, HAIR),
        head=_choice(rng, ("short", "long", "bald", "cap", "beanie")), hat=_choice(rng, PALETTE),
        shirt=shirt, shirt2=shirt2, pattern=_choice(rng, PATTERNS),
        sleeves=_choice(rng, ("long", "short", "second")),
        legs=_choice(rng, ("trousers", "shorts", "skirt", "striped"), (0.4, 0.2, 0.2, 0.2)),
        trousers=trousers, trousers2=trousers2, shoes=_choice(rng, PALETTE),
        bag=_choice(rng, BAGS), bag_colour=_choice(rng, PALETTE),
    )  # fmt: skip


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(v * factor)) for v in colour)
    return r, g, b


def _shirt_texture(person: Person, front: bool) -> Image.Image:
    """The shirt's cloth, 96 × 120 pixels with the collar at the top centre; logos and vests show at the front only."""
    from PIL import Image, ImageDraw

    w, h = 96, 120
    cloth = Image.new("RGB", (w, h), person.shirt)
    draw, second = ImageDraw.Draw(cloth), person.shirt2
    if person.pattern in ("stripes", "checks"):
        for y in range(6, h, 20):
            draw.rectangle((0, y, w, y + 8), fill=second)
    if person.pattern in ("bars", "checks"):
        for x in range(w // 2 - 44, w, 16):
            draw.rectangle((x, 0, x + 6, h), fill=second)
    if person.pattern == "dots":
        for row, y in enumerate(range(4, h, 14)):
            for x in range(-8 + 8 * (row % 2), w, 16):
                draw.ellipse((x, y, x + 8, y + 8), fill=second)
    elif person.pattern == "halves":
        draw.rectangle((0, 46, w, h), fill=second)
    elif person.pattern == "sash":
        draw.line((w // 2 - 40, 0, w // 2 + 40, 96), fill=second, width=18)
    elif person.pattern == "band":
        draw.rectangle((0, 28, w, 54), fill=second)
    elif person.pattern == "logo":
        if front:
            draw.ellipse((w // 2 - 15, 22, w // 2 + 15, 52), fill=second)
        else:
            draw.rectangle((w // 2 - 22, 20, w // 2 + 22, 34), fill=second)
    elif person.pattern == "vest" and front:
        draw.polygon(((w // 2 - 14, 0), (w // 2 + 14, 0), (w // 2 + 7, h), (w // 2 - 7, h)), fill=second)
    return cloth


def draw_figure(person: Person, facing: int, phase: float, stride: float) -> Image.Image:
    """One pedestrian on a transparent RGBA canvas of 128 × 256 pixels, feet at y = 248.

    facing: 0 front, 1 back, 2 left, 3 right; phase in radians and stride (0 stands still) give the step.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (_W, _H), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    cx, foot, tall = _W / 2, 248.0, 236.0 * person.height
    side, turn = facing >= 2, (-1.0 if facing == 2 else 1.0)
    wide = 1.18 * person.width * tall * (0.72 if side else 1.0)
    bob = 0.012 * tall * abs(math.sin(phase)) * stride

    def y(fraction: float) -> float:  # 0 at the crown, 1 at the soles
        return foot - tall * (1 - fraction) - bob

    def limb(start: Point, end: Point, thick: float, colour: Colour) -> None:
        draw.line((*start, *end), fill=colour, width=max(2, int(thick)))
        for x0, y0 in (start, end):
            draw.ellipse((x0 - thick / 2, y0 - thick / 2, x0 + thick / 2, y0 + thick / 2), fill=colour)

    def at(start: Point, angle: float, length: float) -> Point:
        return start[0] + math.sin(angle) * length, start[1] + math.cos(angle) * length

    swing = 0.5 * stride * math.sin(phase)
    shoulder, hip = 0.104 * wide, 0.086 * wide
    arm_thick, leg_thick = 0.055 * tall * person.width, 0.078 * tall * person.width

    def leg(sign: float, shade: float) -> None:
        root = (cx + (0 if side else sign * hip * 0.55), y(0.53))
        angle = turn * sign * swing if side else sign * 0.04
        bend = -turn * max(0.0, -sign * math.sin(phase)) * 0.5 * stride if side else 0.0
        lift = 0.0 if side else 0.05 * tall * max(0.0, sign * math.sin(phase)) * stride
        knee = at(root, angle, 0.22 * tall - lift / 2)
        ankle = at(knee, angle + bend, 0.21 * tall - lift / 2)
        upper = _shade(person.trousers, shade)
        lower = upper if person.legs in ("trousers", "striped") else _shade(person.skin, shade)
        limb(knee, ankle, leg_thick * 0.85, lower)
        limb(root, knee, leg_thick, upper)
        if person.legs == "striped":
            for part in ((root, knee), (knee, ankle)):
                draw.line((*part[0], *part[1]), fill=_shade(person.trousers2, shade), width=int(leg_thick * 0.45))
        toe = (ankle[0] + (turn * 0.05 * tall if side else sign * 0.012 * tall), ankle[1] + 0.012 * tall)
        limb((ankle[0], ankle[1] + 0.012 * tall), toe, 0.045 * tall, _shade(person.shoes, shade))

    def arm(sign: float, shade: float) -> Point:
        root = (cx + (0 if side else sign * (shoulder + arm_thick * 0.1)), y(0.195))
        angle = -turn * sign * swing * 0.9 if side else sign * (0.10 + 0.1 * stride * math.sin(phase * sign))
        elbow = at(root, angle, 0.16 * tall)
        hand = at(elbow, angle + (turn * 0.25 if side else -sign * 0.1), 0.15 * tall)
        sleeve = _shade(person.shirt2 if person.sleeves == "second" else person.shirt, shade)
        limb(elbow, hand, arm_thick * 0.8, _shade(person.skin, shade) if person.sleeves == "short" else sleeve)
        limb(root, elbow, arm_thick, sleeve)
        limb(hand, at(hand, angle, 0.02 * tall), arm_thick * 0.75, _shade(person.skin, shade))
        return hand

    bag = person.bag_colour
    if person.bag == "suitcase":
        x0 = cx - turn * 0.2 * tall
        draw.line((x0, y(0.55), x0, y(0.72)), fill=_shade(bag, 0.6), width=3)
        draw.rectangle((x0 - 0.06 * tall, y(0.72), x0 + 0.06 * tall, y(0.98)), fill=bag)
    leg(-1.0, 0.8)
    leg(1.0, 1.0)
    far_hand = arm(-1.0, 0.8)
    if person.legs == "skirt":
        draw.polygon(((cx - hip, y(0.50)), (cx + hip, y(0.50)), (cx + 1.5 * hip, y(0.74)), (cx - 1.5 * hip, y(0.74))),
                     fill=person.trousers)  # fmt: skip
    if person.bag == "backpack" and side:
        x0 = cx - turn * (shoulder + 0.02 * tall)
        draw.rounded_rectangle((x0 - 0.07 * tall, y(0.18), x0 + 0.07 * tall, y(0.43)), 8, fill=bag)
    # Torso: cloth pasted through the torso's outline.
    mask = Image.new("L", (_W, _H), 0)
    ImageDraw.Draw(mask).polygon(
        ((cx - shoulder, y(0.19)), (cx - 0.85 * shoulder, y(0.17)), (cx - 0.35 * shoulder, y(0.145)),
         (cx + 0.35 * shoulder, y(0.145)), (cx + 0.85 * shoulder, y(0.17)), (cx + shoulder, y(0.19)), (cx + hip * 1.02, y(0.545)), (cx - hip * 1.02, y(0.545))), fill=255)  # fmt: skip
    cloth = Image.new("RGB", (_W, _H))
    cloth.paste(_shirt_texture(person, facing != 1), (int(cx) - 48, int(y(0.14))))
    canvas.paste(cloth, (0, 0), mask)
    # Head: hair behind, face, hair or hat in front.
    head = (cx + (turn * 0.012 * tall if side else 0.0), y(0.072))
    rx, ry = (0.046 * tall, 0.062 * tall)
    draw.rectangle((cx - 0.022 * tall, y(0.11), cx + 0.022 * tall, y(0.16)), fill=_shade(person.skin, 0.85))
    if person.head == "long":
        draw.rounded_rectangle((head[0] - rx * 1.25, y(0.02), head[0] + rx * 1.25, y(0.215)), 10, fill=person.hair)
    draw.ellipse((head[0] - rx, head[1] - ry, head[0] + rx, head[1] + ry), fill=person.skin)
    crown = (head[0] - rx * 1.1, head[1] - ry * 1.1, head[0] + rx * 1.1, head[1] + ry * 0.9)
    hairy = person.head in ("short", "long")
    top = person.hair if hairy else person.hat
    if facing == 1 and hairy:
        draw.ellipse((crown[0], crown[1], crown[2], head[1] + ry * 0.8), fill=top)
    elif person.head != "bald":
        draw.pieslice(crown, 175, 365, fill=top)
        if side and hairy:
            draw.pieslice(crown, 90 if turn > 0 else -90, 270 if turn > 0 else 90, fill=top)
    if person.head == "cap" and facing != 1:
        reach = rx * 1.9 * turn if side else 0.0
        left, right = sorted((head[0] - (0 if side else rx * 1.2), head[0] + (reach if side else rx * 1.2)))
        draw.rectangle((left, head[1] - ry * 0.25, right, head[1] - ry * 0.02), fill=_shade(top, 0.8))
    if person.head == "beanie":
        draw.rectangle((crown[0], head[1] - ry * 0.35, crown[2], head[1] - 1), fill=_shade(top, 0.75))
    if person.bag == "backpack" and facing == 1:
        draw.rounded_rectangle((cx - 0.085 * tall, y(0.18), cx + 0.085 * tall, y(0.44)), 10, fill=bag)
        draw.rectangle((cx - 0.05 * tall, y(0.33), cx + 0.05 * tall, y(0.40)), fill=_shade(bag, 0.7))
    elif person.bag == "backpack" and facing == 0:
        for sign in (-1, 1):
            x0 = cx + sign * 0.6 * shoulder
            draw.line((x0, y(0.155), x0, y(0.38)), fill=bag, width=7)
    elif person.bag == "shoulder":
        draw.line((cx - 0.8 * shoulder, y(0.16), cx + hip, y(0.50)), fill=_shade(bag, 0.85), width=6)
        draw.rounded_rectangle((cx + hip - 0.05 * tall, y(0.47), cx + hip + 0.07 * tall, y(0.60)), 5, fill=bag)
    near_hand = arm(1.0, 0.95)
    if person.bag == "handbag":
        x0, y0 = far_hand if facing == 2 else near_hand
        draw.rectangle((x0 - 0.05 * tall, y0 + 0.03 * tall, x0 + 0.05 * tall, y0 + 0.14 * tall), fill=bag)
        draw.arc((x0 - 0.03 * tall, y0 - 0.02 * tall, x0 + 0.03 * tall, y0 + 0.08 * tall), 180, 360, fill=bag, width=3)
    return canvas


@lru_cache(maxsize=NUM_CAMERAS)
def _scene(camera: int) -> Image.Image:
    """A camera's whole surroundings, 512 × 320 pixels; images show crops of it. The same for every seed."""
    from PIL import Image, ImageDraw, ImageFilter

    rng, w, h, horizon = np.random.default_rng([77, camera]), 512, 320, 130
    kind = CAMERAS[camera].background
    wall, floor = {
        "street": ((158, 162, 170), (120, 118, 116)), "bricks": ((150, 92, 74), (132, 124, 112)),
        "corridor": ((204, 206, 200), (150, 148, 140)), "fence": ((120, 140, 160), (104, 100, 92)),
        "grass": ((132, 150, 140), (86, 124, 62)), "plaza": ((176, 170, 156), (190, 182, 166)),
    }[kind]  # fmt: skip
    scene = Image.new("RGB", (w, h), wall)
    draw = ImageDraw.Draw(scene)
    if kind == "bricks":
        for row, y in enumerate(range(0, horizon, 10)):
            for x in range(-12 * (row % 2), w, 24):
                draw.rectangle((x, y, x + 22, y + 8), fill=_shade(wall, rng.uniform(0.75, 1.15)))
    else:  # windows, doors, posts, trees: upright rectangles of any colour
        for _ in range(26):
            x, top = int(rng.integers(0, w)), int(rng.integers(-40, horizon - 20))
            base = _choice(rng, PALETTE) if rng.random() < 0.12 else wall
            size = (int(rng.integers(8, 44)), int(rng.integers(20, 110)))
            box = (x, top, x + size[0], min(top + size[1], horizon))
            draw.rectangle(box, fill=_shade(base, rng.uniform(0.6, 1.15)))
    draw.rectangle((0, horizon, w, h), fill=floor)
    if kind in ("plaza", "corridor", "street"):
        for i in range(-12, 28):
            draw.line((w / 2 + (i - 8) * 24, horizon, w / 2 + (i - 8) * 90, h), fill=_shade(floor, 0.82), width=2)
        for step in range(8):
            y = horizon + step * step * 4
            draw.line((0, y, w, y), fill=_shade(floor, 0.85), width=2)
    else:
        for _ in range(900):
            x, y = int(rng.integers(0, w)), int(rng.integers(horizon, h))
            draw.line((x, y, x + int(rng.integers(2, 7)), y - 3), fill=_shade(floor, rng.uniform(0.7, 1.25)))
    if kind == "fence":
        for x in range(0, w, 18):
            draw.line((x, 60, x, horizon + 30), fill=(60, 62, 66), width=4)
    return scene.filter(ImageFilter.GaussianBlur(2.0))


def _project(figure: Image.Image, camera: Camera, scale: float, dx: float, dy: float) -> Image.Image:
    """The figure as the camera sees it: scale, foreshortening, shear and a perspective about the feet."""
    from PIL import Image

    cx, foot, tall = _W / 2, 248.0, camera.scale * scale
    # The perspective magnifies the head's end: undo that on the whole, so that tall × foreshortening is the height.
    rise = camera.tilt * tall * camera.foreshortening * 224 / _H
    sx, sy = (1 + rise / 2) / tall, (1 + rise) / (tall * camera.foreshortening)
    # Homography from output to input pixels, built about the feet: u = x − cx − dx, v = y − foot − dy.
    to_feet = np.array([[1, 0, -cx - dx], [0, 1, -foot - dy], [0, 0, 1]])
    view = np.array([[sx, camera.shear, 0], [0, sy, 0], [0, -camera.tilt / _H, 1]])
    m = np.array([[1, 0, cx], [0, 1, foot], [0, 0, 1]]) @ view @ to_feet
    m = m / m[2, 2]
    return figure.transform(figure.size, Image.Transform.PERSPECTIVE, tuple(m.flatten()[:8]), Image.Resampling.BILINEAR)


def draw_image(person: Person | None, camera_index: int, facing: int, rng: np.random.Generator) -> Image.Image:
    """One 64 × 128 RGB image by camera 0-5; person None draws junk: an empty or badly cut box."""
    from PIL import Image, ImageDraw, ImageFilter

    camera = CAMERAS[camera_index]
    x, y = int(rng.integers(0, 512 - _W)), int(rng.integers(0, 320 - _H))
    image = _scene(camera_index).crop((x, y, x + _W, y + _H))

    def add(who: Person, face: int, scale: float, dx: float, dy: float) -> None:
        figure = _project(draw_figure(who, face, rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 1.0)), camera, scale, dx, dy)
        image.paste(figure, (0, 0), figure)

    def somebody(scale: float, dx: float, dy: float) -> None:
        add(draw_attributes(rng), int(rng.integers(4)), scale, dx, dy)

    aside = float(rng.choice((-1, 1)))
    if rng.random() < 0.10:
        somebody(rng.uniform(0.5, 0.8), aside * rng.uniform(35, 60), rng.uniform(-50, -10))
    if person is not None:
        add(person, facing, rng.uniform(0.94, 1.05), rng.uniform(-6, 6), rng.uniform(-5, 5))
    elif rng.random() < 0.6:
        somebody(rng.uniform(1.0, 1.8), rng.choice((-1, 1)) * rng.uniform(40, 75), rng.uniform(40, 150))
    draw, hidden = ImageDraw.Draw(image), rng.random()
    if hidden < 0.04:  # a pole
        x0 = rng.uniform(20, _W - 20)
        draw.rectangle((x0, 0, x0 + rng.uniform(8, 16), _H), fill=_shade((100, 100, 104), rng.uniform(0.5, 1.4)))
    elif hidden < 0.08:  # a car or a wall hides the legs
        top = _H * rng.uniform(0.62, 0.82)
        draw.rounded_rectangle((-20, top, _W + 20, _H + 40), 24, fill=_shade(_choice(rng, PALETTE), rng.uniform(0.7, 1.1)))
        draw.rectangle((0, top + 16, _W, top + 20), fill=(40, 40, 44))
    elif hidden < 0.12:  # somebody in front
        somebody(rng.uniform(0.95, 1.15), aside * rng.uniform(46, 66), rng.uniform(0, 16))
    small = image.reduce(2)
    radius = camera.blur + rng.exponential(0.25)
    small = small.filter(ImageFilter.GaussianBlur(min(radius, 1.8)))
    # Light: exposure and colour vary from image to image around the camera's own.
    light = np.asarray(small, dtype=np.float32) / 255
    gain = np.asarray(camera.gain) * rng.normal(1.0, 0.03, 3) * np.exp(rng.normal(0, 0.10))
    ramp = 1 + rng.normal(0, 0.06) * np.linspace(-1, 1, HEIGHT)[:, None, None]
    light = 0.5 + camera.contrast * (np.clip(light * gain * ramp, 0, 1) ** camera.gamma - 0.5)
    light = light * 255 + rng.normal(0, camera.noise, light.shape)
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


def _plan(seed: int) -> Iterator[tuple[str, int, int, int, int, np.random.Generator]]:
    """Every image: (folder, pid, camera 0-5, index in the visit, facing, generator)."""
    for pid in range(1, NUM_PEOPLE + 1):
        visits = np.random.default_rng([seed, 2, pid])
        for camera in sorted(visits.choice(NUM_CAMERAS, CAMERAS_PER_PERSON, replace=False).tolist()):
            usual = int(visits.integers(4))  # a person mostly crosses a camera's view in one direction
            for index in range(IMAGES_PER_VISIT):
                rng = np.random.default_rng([seed, 3, pid, camera, index])
                facing = usual if rng.random() < 0.7 else int(rng.integers(4))
                test_folder = "query" if index == 0 else "bounding_box_test"
                yield (test_folder if pid % 4 == 0 else "bounding_box_train"), pid, camera, index, facing, rng
    for i in range(NUM_DISTRACTORS + NUM_JUNK):
        rng = np.random.default_rng([seed, 4, i])
        pid = 0 if i < NUM_DISTRACTORS else -1
        yield "bounding_box_test", pid, int(rng.integers(NUM_CAMERAS)), i, int(rng.integers(4)), rng


def write_demo(root: str | os.PathLike[str], seed: int = 0, *, progress: bool = True) -> None:
    """Draws the whole data set into `root`: the same seed gives the same bytes (for one version of Pillow and numpy).

    160 people (120 to train, every fourth to test) × 4 of 6 cameras × 3 images; of a test person's visit the first
    image is the query. The gallery also holds 48 strangers (pid 0) and 32 junk boxes (pid −1). 2,000 JPEG files.
    """
    from tqdm import tqdm

    folders = {name: Path(root) / name for name in ("bounding_box_train", "query", "bounding_box_test")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    people = {pid: draw_attributes(np.random.default_rng([seed, 1, pid])) for pid in range(1, NUM_PEOPLE + 1)}
    total = NUM_PEOPLE * CAMERAS_PER_PERSON * IMAGES_PER_VISIT + NUM_DISTRACTORS + NUM_JUNK
    bar = tqdm(_plan(seed), total=total, desc=f"drawing the demo data set (seed {seed})", unit="image",
               disable=None if progress else True)  # fmt: skip
    for folder, pid, camera, index, facing, rng in bar:
        person = None if pid == -1 else draw_attributes(rng) if pid == 0 else people[pid]
        image = draw_image(person, camera, facing, rng)
        name = f"{pid if pid < 0 else f'{pid:04d}'}_c{camera + 1}s1_{int(rng.integers(10**6)):06d}_{index:02d}.jpg"
        image.save(folders[folder] / name, quality=CAMERAS[camera].quality)


def cache_folder() -> Path:
    """Where drawn data sets are kept: $SABMN_CACHE, else $XDG_CACHE_HOME/sabmn_ext, else ~/.cache/sabmn_ext."""
    if os.environ.get("SABMN_CACHE"):
        return Path(os.environ["SABMN_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "sabmn_ext"


def demo_root(seed: int = 0, *, progress: bool = True) -> Path:
    """The folder of the demo data set of this seed, drawn on first use (seconds) and cached.

    It is drawn into a temporary folder and renamed, so that a killed run leaves nothing that looks whole and two
    processes may do it at once.
    """
    root = cache_folder() / f"demo-v{DRAWING_VERSION}-seed{seed}"
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    for stale in root.parent.glob(".drawing-*"):  # left by killed runs; an hour is far longer than drawing takes
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".drawing-", dir=root.parent))
    try:
        write_demo(temporary, seed, progress=progress)
        temporary.chmod(0o755)
        try:
            temporary.rename(root)
        except OSError:
            if not root.is_dir():  # otherwise another process was faster, with the same pictures
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def load(path: str = "demo") -> ReidData:
    """path: "demo" (seed 0) or "demo:SEED"."""
    from .market1501 import read_market_style

    _, _, seed = path.partition(":")
    if not (seed or "0").isdecimal():
        raise ValueError(f"data path {path!r}: expected 'demo' or 'demo:SEED' with SEED a number from 0, such as 'demo:1'")
    return read_market_style(demo_root(int(seed or 0)), path, None)


def mean_colour_features(records: Sequence[ImageRecord]) -> np.ndarray:
    """The mean of each colour channel over the whole image, [n, 3] float32 in 0-255: the baseline that knows colour only."""
    from PIL import Image

    rows = []
    for record in records:
        with Image.open(record.path) as image:
            rows.append(np.asarray(image.convert("RGB"), dtype=np.float32).mean(axis=(0, 1)))
    return np.stack(rows)
