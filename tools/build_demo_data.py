"""Builds the bundled demo data (stills, clips, notes) from packages of public registries.

    python -m tools.build_demo_data CACHE    # download, verify, build src/openimp/data/demo/
    python -m tools.build_demo_data --card --contact-sheet    # refresh docs/data-card.md's numbers and its picture

For maintainers, on Debian 13. Besides openimp's dependencies (Pillow, numpy, pyarrow, soundfile), the build needs
`npm`, `apt-get`, `dpkg-deb`, `fluidsynth` and `oggenc` (vorbis-tools). A second run writes the same bytes, but another
release of an encoder may not. The committed files come from Pillow 13.0.0, pyarrow 26.0.1, FluidSynth 2.4.4 and oggenc
1.4.3. The archives (900 MB) stay in CACHE and are checked against the checksums below. They are read in memory: only
the soundfont is extracted to disk.
"""

import argparse
import hashlib
import io
import json
import re
import struct
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from tools.archives import fetched, members
from tools.demo_data_docs import write_card, write_contact_sheet, write_licenses, write_sums

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src/openimp/data/demo"
SIZE, FRAMES = 64, 8
RATE, RENDER_RATE, MIN_NOTES, MAX_NOTES = 16_000, 48_000, 8, 12
SECONDS, SLOT, HELD = 2.0, 2.5, 1.5  # Seconds of a stored note, between note starts, and of a pressed key.

SOURCES = {line.split()[0]: line.split()[1:] for line in """\
emoji-datasource-google 16.0.0 Apache-2.0 fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438
emoji-datasource-twitter 16.0.0 CC-BY-4.0 f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877
@lobehub/fluent-emoji-3d 1.1.0 MIT c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58
@lobehub/fluent-emoji-anim-1 1.0.0 MIT 4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea
@lobehub/fluent-emoji-anim-2 1.0.0 MIT e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0
@lobehub/fluent-emoji-anim-3 1.0.0 MIT 3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43
@lobehub/fluent-emoji-anim-4 1.0.0 MIT 3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3
emojibase-data 17.0.0 MIT d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a
musescore-general-soundfont-small 0.2.1-1 MIT-and-CC0 65f9c1cb658c49e8713d2c95238d5d26868f520341f74a4fe26248a8f763c739
""".splitlines()}  # fmt: skip

GENERAL_MIDI = [line.split(": ") for line in re.sub(r",\n +", ", ", """\
piano: acoustic grand piano, bright acoustic piano, electric grand piano, honky-tonk piano, electric piano 1,
       electric piano 2, harpsichord, clavinet
chromatic percussion: celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bells, dulcimer
organ: drawbar organ, percussive organ, rock organ, church organ, reed organ, accordion, harmonica, tango accordion
guitar: nylon string guitar, steel string guitar, jazz guitar, clean electric guitar, muted electric guitar,
        overdriven guitar, distortion guitar, guitar harmonics
bass: acoustic bass, fingered bass, picked bass, fretless bass, slap bass 1, slap bass 2, synth bass 1, synth bass 2
strings: violin, viola, cello, contrabass, tremolo strings, pizzicato strings, orchestral harp, timpani
ensemble: string ensemble 1, string ensemble 2, synth strings 1, synth strings 2, choir aahs, voice oohs, synth voice,
          orchestra hit
brass: trumpet, trombone, tuba, muted trumpet, french horn, brass section, synth brass 1, synth brass 2
reed: soprano sax, alto sax, tenor sax, baritone sax, oboe, english horn, bassoon, clarinet
pipe: piccolo, flute, recorder, pan flute, blown bottle, shakuhachi, whistle, ocarina
synth lead: square lead, sawtooth lead, calliope lead, chiff lead, charang lead, voice lead, fifths lead, bass and lead
synth pad: new age pad, warm pad, polysynth pad, choir pad, bowed pad, metallic pad, halo pad, sweep pad
synth effects: rain effect, soundtrack effect, crystal effect, atmosphere effect, brightness effect, goblins effect,
               echoes effect, sci-fi effect
ethnic: sitar, banjo, shamisen, koto, kalimba, bagpipe, fiddle, shanai
percussive: tinkle bell, agogo, steel drums, woodblock, taiko drum, melodic tom, synth drum, reverse cymbal
sound effects: guitar fret noise, breath noise, seashore, bird tweet, telephone ring, helicopter, applause, gunshot
""").splitlines()]  # fmt: skip


def fetch(name: str, cache: Path) -> Path:
    """Downloads the archive into the cache if it is missing, and checks its checksum."""
    version, _, checksum = SOURCES[name]
    if name.startswith("musescore"):
        return fetched(cache / f"{name}_{version}_all.deb", checksum, ["apt-get", "download", f"{name}={version}"])
    stem = name.removeprefix("@").replace("/", "-")
    return fetched(cache / f"{stem}-{version}.tgz", checksum, ["npm", "pack", f"{name}@{version}"])


def emoji_key(name: str) -> str:
    """Returns the emoji of a file name or hexcode. The sources differ in case and in variation selectors."""
    return Path(name).stem.lower().replace("-fe0f", "")


GENDER = re.compile(r"\b(men|man|women|woman|people|person|male|female)\b")
SAME_CONCEPT = {  # Families that removing gender words does not find.
    "boy": "child", "girl": "child", "princess": "prince", "merman": "merperson", "mermaid": "merperson",
    "old": "older", "mrs. claus": "santa claus", "mx claus": "santa claus", "and holding hands": "holding hands",
}  # fmt: skip


def concept_of(label: str, group: str) -> str:
    """Returns an emoji's concept family: "man cook", "woman cook" and "cook" are all "cook".

    Gender words are removed only in "people & body": "men’s room" is not "women’s room".
    """
    label = label.lower()
    if group != "people & body":
        return label
    label = re.sub(r"^(family|kiss|couple with heart): .*", r"\1", label)
    family = re.sub(r"\s+", " ", GENDER.sub("", label)).strip(" :,")
    return SAME_CONCEPT.get(family, family) or "person"


def split_of(concept: str) -> str:
    """Returns the split of a concept family by its hash, the same for stills and clips: 15% test, 5% val."""
    place = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.15 else "val" if place < 0.20 else "train"


def words(text: str) -> list[str]:
    """Splits a name or shortcode into lower-case words."""
    return re.sub(r"[\s_\-:,()“”]+", " ", text.lower().replace("&", " and ")).split()


def distinct(texts: list[str]) -> list[str]:
    """Drops texts that are equal to an earlier one except for spaces and punctuation."""
    kept: dict[str, str] = {}
    for text in texts:
        kept.setdefault(re.sub(r"[\W_]+", "", text) or text, text)
    return list(kept.values())


def emoji_texts(emojibase: Path, emoji_data: Path) -> dict[str, dict[str, Any]]:
    """Returns {emoji key: text columns} of each emoji that has a group and is not a flag."""
    load = {Path(n).stem: json.loads(content) for n, content in members(emojibase, r"^package/en/.*\.json$")}
    groups, subgroups = ({m["order"]: m["message"] for m in load["messages"][kind]} for kind in ("groups", "subgroups"))
    shortcodes = [load[s] for s in ("cldr", "emojibase", "emojibase-legacy", "joypixels", "github", "iamcal")]
    ((_, names_file),) = members(emoji_data, r"^package/emoji\.json$")
    unicode_names = {emoji_key(e["unified"]): e["name"] or "" for e in json.loads(names_file)}
    found = {emoji_key(e["hexcode"]): e for e in load["data"] if groups.get(e.get("group"), "flags") != "flags"}
    # Shortcodes such as "u6e80" or "thumbsup" are not English: keep those made of words in names and keywords.
    texts_of = ([e["label"], *e.get("tags", []), unicode_names.get(key, "")] for key, e in found.items())
    english = {word for texts in texts_of for text in texts for word in words(text)}
    texts = {}
    for key, e in found.items():
        codes = [s.get(e["hexcode"], []) for s in shortcodes]
        codes = [code for some in codes for code in ([some] if isinstance(some, str) else some)]
        names = [unicode_names.get(key, ""), *codes]
        names = [" ".join(words(name)) for name in names if name and english.issuperset(words(name))]
        group = groups[e["group"]]
        concept = concept_of(e["label"], group)
        texts[key] = {
            "emoji": e["hexcode"], "concept": concept, "name": e["label"], "keywords": e.get("tags", []),
            "captions": distinct([e["label"].lower(), *names]),
            "group": group, "subgroup": subgroups[e["subgroup"]], "split": split_of(concept),
        }  # fmt: skip
    return texts


def small(picture: Image.Image) -> Image.Image:
    """Converts a picture to RGBA of SIZE x SIZE."""
    return picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def still(content: bytes) -> bytes:
    """Converts a picture file to a small WebP with alpha."""
    out = io.BytesIO()
    small(Image.open(io.BytesIO(content))).save(out, "WEBP", quality=80)
    return out.getvalue()


def clip(content: bytes) -> bytes | None:
    """Converts an animation to FRAMES small frames of the same total duration; returns None for a still picture."""
    animation = Image.open(io.BytesIO(content))
    count = getattr(animation, "n_frames", 1)
    if count < FRAMES:
        return None
    starts = [i * count // FRAMES for i in range(FRAMES)]
    frames, durations = [], [0] * FRAMES
    for i in range(count):
        animation.seek(i)
        animation.load()
        if i in starts:
            frames.append(small(animation))
        durations[len(frames) - 1] += animation.info["duration"]
    out = io.BytesIO()
    # A lossless alpha channel would be a third of the file.
    options = {"duration": durations, "quality": 65, "alpha_quality": 40}
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], **options)
    return out.getvalue()


def picture_rows(cache: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of stills and clips of the emoji that all vendors have, sorted by emoji and vendor."""
    vendors = {}
    for vendor, name, folder in (
        ("fluent", "@lobehub/fluent-emoji-3d", "assets"),
        ("noto", "emoji-datasource-google", "img/google/64"),
        ("twemoji", "emoji-datasource-twitter", "img/twitter/64"),
    ):
        files = members(fetch(name, cache), rf"^package/{folder}/.*\.(png|webp)$")
        vendors[vendor] = {emoji_key(path): content for path, content in files}
    texts = emoji_texts(fetch("emojibase-data", cache), fetch("emoji-datasource-google", cache))
    texts = {key: texts[key] for key in sorted(texts) if all(key in files for files in vendors.values())}
    stills = [{"image": still(vendors[v][key]), "vendor": v, **text} for key, text in texts.items() for v in vendors]
    clips = []
    for part in range(1, 5):
        for name, content in members(fetch(f"@lobehub/fluent-emoji-anim-{part}", cache), r"\.webp$"):
            if (key := emoji_key(name)) in texts and (video := clip(content)):
                clips.append({"video": video, **texts[key]})
    return stills, sorted(clips, key=lambda row: emoji_key(row["emoji"]))


Zone = tuple[int, int, int, int]  # Lowest key, highest key, root key, sample.


def soundfont_presets(sf3: bytes) -> dict[int, tuple[str, list[Zone]]]:
    """Returns {program: (name, zones that sound at velocity 100)} of bank 0 (SoundFont 2.04, section 7).

    Generators: 41 = instrument, 43 = key range, 44 = velocity range, 53 = sample, 58 = root key.
    """
    at, tables = sf3.rindex(b"pdtaphdr") + 4, {}  # Chunks of an SF3 may lack their pad byte, so search.
    while at < len(sf3):
        tag, size = struct.unpack_from("<4sI", sf3, at)
        tables[tag.decode()] = sf3[at + 8 : at + 8 + size]
        at += 8 + size + size % 2

    def rows(tag: str, layout: str) -> list[tuple[Any, ...]]:
        return list(struct.iter_unpack(layout, tables[tag]))

    def zones(bags: list, gens: list, first: int, last: int, target: int) -> Iterator[dict[int, int]]:
        common: dict[int, int] = {43: 127 << 8, 44: 127 << 8}
        for bag in range(first, last):
            zone = dict(gens[bags[bag][0] : bags[bag + 1][0]])
            if target in zone:
                yield common | zone
            elif bag == first:
                common |= zone

    presets, pbag, pgen = rows("phdr", "<20sHHHIII"), rows("pbag", "<HH"), rows("pgen", "<HH")
    instruments, ibag, igen = rows("inst", "<20sH"), rows("ibag", "<HH"), rows("igen", "<HH")
    samples, found = rows("shdr", "<20sIIIIIBbHH"), {}
    for preset, following in pairwise(presets):
        if preset[2] != 0:
            continue
        heard = []
        for outer in zones(pbag, pgen, preset[3], following[3], 41):
            for inner in zones(ibag, igen, instruments[outer[41]][1], instruments[outer[41] + 1][1], 53):
                low, high = max(outer[43] & 255, inner[43] & 255), min(outer[43] >> 8, inner[43] >> 8)
                if low <= high and all(z[44] & 255 <= 100 <= z[44] >> 8 for z in (outer, inner)):
                    root = inner.get(58, 255)
                    heard.append((low, high, root if root < 128 else samples[inner[53]][6], inner[53]))
        found[preset[1]] = (preset[0].split(b"\0")[0].decode().lower(), heard)
    return found


def choose_pitches(zones: list[Zone], taken: set[int]) -> list[int]:
    """Returns the pitches to play: the root keys of the recorded samples that no earlier instrument uses.

    If there are more than MAX_NOTES, evenly spaced ones are chosen. If there are fewer than MIN_NOTES, the widest gaps
    are halved, at most an octave beyond the outermost roots. An instrument without its own sample gets no pitch.
    """
    pitches = {min(max(root, low), high) for low, high, root, sample in zones if sample not in taken}
    pitches = {p for p in pitches if 21 <= p <= 108}
    reach = range(max(min(pitches) - 12, 21), min(max(pitches) + 12, 108) + 1) if pitches else range(0)
    spare = {p for p in reach if any(low <= p <= high for low, high, *_ in zones)} - pitches
    while len(pitches) < MIN_NOTES and spare:
        pitches.add(max(spare, key=lambda p: (min(abs(p - q) for q in pitches), -p)))
        spare -= pitches
    chosen, step = sorted(pitches), max(len(pitches) / MAX_NOTES, 1)
    return [chosen[int(i * step)] for i in range(min(len(pitches), MAX_NOTES))]


def midi_file(program: int, pitches: list[int]) -> bytes:
    """Return a MIDI file (1 tick = 1 ms) that plays the pitches one by one, a slot each, silenced before the next."""
    events = [(0.0, b"\xff\x51\x03" + (1_000_000).to_bytes(3, "big")), (0.0, bytes([0xC0, program]))]
    for i, pitch in enumerate(pitches):
        events.append((i * SLOT, bytes([0x90, pitch, 100])))
        events.append((i * SLOT + HELD, bytes([0x80, pitch, 0])))
        events.append((i * SLOT + SLOT - 0.2, b"\xb0\x78\0"))  # all sound off
    track, now = b"", 0
    for seconds, event in [*events, (len(pitches) * SLOT, b"\xff\x2f\0")]:
        wait = round(seconds * 1000) - now
        track += bytes([wait >> 7 | 0x80, wait & 0x7F]) + event
        now += wait
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000) + b"MTrk" + struct.pack(">I", len(track)) + track


def render(soundfont: Path, program: int, pitches: list[int]) -> list[bytes]:
    """Return each pitch as Ogg Vorbis, mono at RATE, at most SECONDS long, silent tail cut, peak at 0.7."""
    song, wav = soundfont.with_suffix(".mid"), soundfont.with_suffix(".wav")
    song.write_bytes(midi_file(program, pitches))
    options = f"-niq -R 0 -C 0 -g 0.3 -r {RENDER_RATE} -O float -T wav -o synth.dynamic-sample-loading=1 -F".split()
    subprocess.run(["fluidsynth", *options, wav, soundfont, song], check=True, capture_output=True)
    wave = soundfile.read(wav, dtype="float32")[0].mean(axis=1)
    taps = np.arange(-96, 97) * RATE / RENDER_RATE
    lowpass = 0.95 * RATE / RENDER_RATE * np.sinc(0.95 * taps) * np.hamming(len(taps))
    notes = []
    for i in range(len(pitches)):
        note = wave[int(i * SLOT * RENDER_RATE) :][: int(SECONDS * RENDER_RATE)]
        note = np.convolve(note, lowpass, mode="same")[:: RENDER_RATE // RATE]
        note *= 0.7 / np.abs(note).max()
        note = note[: max(np.flatnonzero(np.abs(note) > 1e-3)[-1] + 1, RATE // 5)]
        note[-160:] *= np.linspace(1, 0, 160)
        plain = io.BytesIO()
        soundfile.write(plain, note, RATE, format="WAV", subtype="PCM_16")
        # libsndfile would draw a random stream number, so no two runs would agree.
        encode = ["oggenc", "-Q", "--serial", "0", "-q", "2", "-o", "-", "-"]
        notes.append(subprocess.run(encode, input=plain.getvalue(), check=True, capture_output=True).stdout)
    return notes


def note_rows(soundfont: Path) -> list[dict[str, Any]]:
    """Renders each instrument that has its own recorded samples. Every fourth note is a test note."""
    presets, rows = soundfont_presets(soundfont.read_bytes()), []
    taken: set[int] = set()
    for program, (family, name) in enumerate((f, n) for f, names in GENERAL_MIDI for n in names.split(", ")):
        preset, zones = presets[program]
        pitches = choose_pitches(zones, taken)
        taken |= {sample for *_, sample in zones}
        captions = distinct([name, preset, f"{name} sound", f"a single {name} note"])
        # Some presets sound the same at every key: keep the first of equal notes.
        sounds = dict(zip(render(soundfont, program, pitches)[::-1], pitches[::-1], strict=True)) if pitches else {}
        for i, (audio, pitch) in enumerate(sorted(sounds.items(), key=lambda item: item[1])):
            rows.append({
                "audio": audio, "instrument": name, "family": family, "program": program, "pitch": pitch,
                "note": "C C#D D#E F F#G G#A A#B "[pitch % 12 * 2 :][:2].strip() + str(pitch // 12 - 1),
                "captions": captions if family != "sound effects" else captions[:-1],
                "split": "test" if i % 4 == 3 else "val" if i % 8 == 1 else "train",
            })  # fmt: skip
    return rows


def write_parquet(name: str, rows: list[dict[str, Any]]) -> None:
    """Writes the rows in order. Only text is compressed, because media already are."""
    kinds = {"program": pa.int32(), "pitch": pa.int32()}
    kinds |= dict.fromkeys(("image", "video", "audio"), pa.binary())
    kinds |= dict.fromkeys(("keywords", "captions"), pa.list_(pa.string()))
    media, *text = rows[0]
    table = pa.Table.from_pylist(rows, schema=pa.schema([(c, kinds.get(c, pa.string())) for c in (media, *text)]))
    paths = [f"{c}.list.element" if c in ("keywords", "captions") else c for c in text]
    pq.write_table(
        table, DEMO / f"{name}.parquet", row_group_size=256, use_dictionary=paths, write_statistics=paths,
        compression={media: "none"} | dict.fromkeys(paths, "zstd"),
    )  # fmt: skip


def build(cache: Path) -> None:
    """Builds everything in src/openimp/data/demo."""
    cache.mkdir(parents=True, exist_ok=True)
    DEMO.mkdir(parents=True, exist_ok=True)
    stills, clips = picture_rows(cache)
    write_parquet("stills", stills)
    write_parquet("clips", clips)
    soundfont = cache / "soundfont.sf3"
    soundfont.write_bytes(next(members(fetch("musescore-general-soundfont-small", cache), r"\.sf3$"))[1])
    write_parquet("notes", note_rows(soundfont))
    write_licenses(DEMO, SOURCES, lambda name, pattern: next(members(fetch(name, cache), pattern))[1].decode())
    write_sums(DEMO)


def main() -> None:
    """Builds the data, or refreshes the card and the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", nargs="?", type=Path, help="folder of the downloaded archives: build the data")
    parser.add_argument("--card", action="store_true", help="refresh the numbers in docs/data-card.md")
    parser.add_argument("--contact-sheet", action="store_true", help="redraw docs/images/demo-data.png")
    args = parser.parse_args()
    if not (args.cache or args.card or args.contact_sheet):
        parser.error("nothing to do: give CACHE, --card or --contact-sheet")
    if args.cache:
        build(args.cache.resolve())
    if args.card:
        write_card(DEMO, ROOT / "docs/data-card.md")
    if args.contact_sheet:
        write_contact_sheet(DEMO, ROOT / "docs/images/demo-data.png")


if __name__ == "__main__":
    main()
