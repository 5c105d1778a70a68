"""The package of icon sets: where it comes from, and which of its sets and icons are used."""

import json
from pathlib import Path
from typing import Any

from tools.archives import fetched, members

PACKAGE, VERSION = "@iconify/json", "2.2.535"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"

LICENSES = {"MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "OFL-1.1", "CC0-1.0", "Unlicense", "CC-BY-3.0", "CC-BY-4.0"}
"""Permissive licenses, by SPDX identifier. Not share-alike, non-commercial, MPL or GPL."""

CATEGORIES = ("Material", "Programming", "Thematic", "Flags / Maps", "UI ")
"""Beginnings of the categories that are used. Not emoji (the demo holds some out), logos and unmaintained sets."""

LEFT_OUT = {
    "brand logos": "academicons catppuccin devicon devicon-plain file-icons gcp k8s material-icon-theme skill-icons "
    "unjs vscode-icons",
    "flags, named by country codes": "cif circle-flags flag flagpack",
    "animated, and often empty at the start": "line-md meteocons svg-spinners",
    "near twins of a set that is used: an older version, a fork, a source or another theme": "bx bxs famicons ic "
    "icon-park-outline icon-park-solid icon-park-twotone maki map meteor-icons pepicons-print streamline-freehand "
    "temaki uim uis",
    "fewer than 50 icons": "geo",
}
"""Reason: sets. Near twins were found by comparing the pictures of all sets."""

HELD_OUT = {
    "test": "at-icons cil dinkie-icons glyphs glyphs-poly icon-park jam marketeq",
    "val": "clarity picon",
}
"""Sets that are never trained on. Their makers have no set that is."""

BRANDS = """\
500px adobe airbnb alipay amazon android anthropic appstore aws azure baidu behance bilibili binance bing bitbucket
blackberry blogger bluesky brand brands bytedance chrome chromecast claude codepen codesandbox debian deno deviantart
digg discord disqus django docker douban dribbble dropbox drupal ebay etsy evernote facebook figma firebase firefox
fitbit fiverr flickr flutter foursquare framer gatsby github gitlab gmail google graphql gumroad ibm instagram intercom
invision java javascript jeep kickstarter kotlin kubernetes laravel linkedin linux logo logos mastercard mastodon
microsoft mitsubishi mongodb mysql netflix netlify nextjs nintendo nodejs npm openai patreon paypal periscope
perplexity php pinterest playstation pokemon postgresql python qq quora reddit renault safari shopify skype slack
snapchat soundcloud spotify squarespace stackoverflow stripe stumbleupon svelte taobao telegram terraform tesla tiktok
tinder trello tumblr twitch twitter typescript uber ubuntu unsplash upwork venmo vercel viber vimeo visa vk volkswagen
vue vuejs wechat weibo weixin whatsapp wikipedia wordpress xbox xing yahoo yelp youtube
"""
UNWANTED = {"alerted", "badged", *BRANDS.split()}
"""An icon whose name has one of these words is left out. The set clarity adds badges and alerts to icons."""


def fetch(folder: Path) -> Path:
    """Downloads the package into the folder if it is missing, and checks its checksum."""
    path = folder / f"{PACKAGE.removeprefix('@').replace('/', '-')}-{VERSION}.tgz"
    return fetched(path, SHA256, ["npm", "pack", f"{PACKAGE}@{VERSION}"])


def is_used(name: str, about: dict[str, Any]) -> bool:
    """True if the set's license and category are wanted, and it is in no list of sets to leave out."""
    if about.get("hidden") or about["license"].get("spdx") not in LICENSES:
        return False
    return about.get("category", "").startswith(CATEGORIES) and name not in " ".join(LEFT_OUT.values()).split()


def read_about(package: Path) -> dict[str, dict[str, Any]]:
    """Returns the package's collections.json: {set: name, author, license, category, palette, ...}."""
    ((_, content),) = members(package, r"^package/collections\.json$")
    return json.loads(content)


def read_sets(package: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Returns {set: (its entry in collections.json, its icons)} of the sets that are used, sorted."""
    abouts = read_about(package)
    found = {}
    for path, content in members(package, r"^package/json/[^/]+\.json$"):
        name = Path(path).stem
        if name in abouts and is_used(name, abouts[name]):
            found[name] = (abouts[name], json.loads(content))
    return dict(sorted(found.items()))


def set_split(name: str) -> str:
    """Returns train, val or test."""
    return next((split for split, sets in HELD_OUT.items() if name in sets.split()), "train")
