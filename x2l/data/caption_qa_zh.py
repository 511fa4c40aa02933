"""The questions of ``caption_qa`` in Chinese, where the photo's native Chinese captions agree.

A fact is found by the English rules; its words are translated by a glossary, never by a model. It is kept only if a Chinese
caption, written by others without sight of the English ones, names it too: the colour, the thing, the sport, the place. "No"
is kept only if no Chinese caption names the thing.
"""

from __future__ import annotations

import random
import re

from x2l.data.caption_qa import QA, RULES, Fact, Wanted, asked
from x2l.data.caption_scene import TOKEN, Scene
from x2l.data.prompts import phrasings

KINDS = ("colour", "clothes colour", "count", "animal", "sport", "setting", "where", "presence")

# English -> Chinese, then what a Chinese caption that agrees holds, where that is not the word itself.
GLOSSARY = {
    line.split()[0].replace("_", " "): (line.split()[1], re.compile([*line.split(), line.split()[1]][2]))
    for line in """
    black 黑色 黑
    white 白色 白
    brown 棕色 棕|褐|咖啡
    red 红色 红
    blue 蓝色 蓝
    green 绿色 绿
    yellow 黄色 黄
    orange 橙色 橙|橘
    pink 粉色 粉
    purple 紫色 紫
    grey 灰色 灰
    gray 灰色 灰
    golden 金色 金
    silver 银色 银
    dog 狗 狗|犬
    cat 猫
    horse 马
    bird 鸟
    cow 牛
    sheep 羊
    goat 山羊 羊
    elephant 大象 象
    camel 骆驼
    person 人
    man 男人 男
    woman 女人 女
    boy 男孩 男孩|小孩|孩子
    girl 女孩
    child 孩子 孩|儿童
    baby 婴儿 婴|宝宝
    ball 球
    frisbee 飞盘
    car 汽车 车
    bike 自行车 自行车|单车
    bicycle 自行车 自行车|单车
    motorcycle 摩托车 摩托
    motorbike 摩托车 摩托
    boat 船
    kayak 皮划艇 艇|船|舟
    umbrella 雨伞 伞
    truck 卡车
    slide 滑梯
    balloon 气球
    collar 项圈
    snowboard 滑雪板
    surfboard 冲浪板
    skateboard 滑板
    tent 帐篷
    couch 沙发
    bench 长椅
    chair 椅子
    guitar 吉他
    shirt 衬衫 衫|衣|T恤
    t-shirt T恤 衫|衣|T恤
    jacket 夹克 夹克|外套|衣
    coat 外套 外套|衣
    dress 裙子 裙
    skirt 裙子 裙
    hat 帽子 帽
    cap 帽子 帽
    helmet 头盔 头盔|帽
    shorts 短裤
    pants 裤子 裤
    jeans 牛仔裤
    vest 背心
    sweater 毛衣
    soccer 足球
    basketball 篮球
    tennis 网球
    baseball 棒球
    hockey 曲棍球 曲棍球|冰球
    volleyball 排球
    rugby 橄榄球
    football 橄榄球
    surfing 冲浪
    skiing 滑雪
    snowboarding 单板滑雪 滑雪
    skateboarding 滑板
    rock_climbing 攀岩 攀|爬
    on_the_beach 海滩上 海滩|沙滩|海边
    in_the_snow 雪地里 雪
    in_a_pool 泳池里 泳池|水池
    on_the_grass 草地上 草
    in_a_field 田野里 田野|草地|草坪|田|原野
    on_a_street 街道上 街|路
    on_a_sidewalk 人行道上 人行道|路
    in_a_park 公园里 公园
    in_the_woods 树林里 树林|森林
    in_the_water 水里 水
    in_the_ocean 海里 海
    in_a_lake 湖里 湖
    in_a_river 河里 河|溪
    on_the_sand 沙地上 沙
    on_a_mountain 山上 山
    on_a_rock 岩石上 岩|石
    on_a_track 跑道上 跑道|赛道
    on_a_couch 沙发上 沙发
    on_a_bed 床上 床
    on_a_bench 长椅上 长椅|长凳
    on_a_stage 舞台上 舞台|台上
    on_a_trampoline 蹦床上 蹦床
    on_a_swing 秋千上 秋千
    on_the_stairs 楼梯上 楼梯|台阶
    in_the_desert 沙漠里 沙漠
    snow 雪
    water 水 水|海|河|湖|泳
    beach 海滩 海滩|沙滩|海边
    swimming_pool 游泳池 泳池
    trampoline 蹦床
    fountain 喷泉
    fence 栅栏 栅栏|围栏|篱笆
    """.strip().splitlines()
}
ANIMAL_MEASURES = {"只": "dog cat bird sheep goat", "匹": "horse", "头": "cow elephant camel"}
MEASURE = {animal: measure for measure, animals in ANIMAL_MEASURES.items() for animal in animals.split()}
NUMBERS = dict(zip("one two three four five six seven".split(), "一两三四五六七", strict=True))
SETTINGS = {"indoors": "室内", "outdoors": "室外"}


def question_answers_zh(
    english: list[str], chinese: list[str], rng: random.Random, num_pairs: int, may_ask: Wanted = lambda question: True
) -> list[QA]:
    """Up to ``num_pairs`` Chinese questions of different kinds about a photo, in random order.

    Args:
        english, chinese: independent descriptions of one photo.
        rng: chooses rules, facts and phrasings; the same seed gives the same pairs.
        may_ask: as of `question_answers`.
    """
    scene, native = Scene([TOKEN.findall(caption) for caption in english]), " ".join(chinese)
    kinds = list(KINDS)
    rng.shuffle(kinds)
    pairs: list[QA] = []
    for kind in kinds:
        found = [_chinese(fact, native) for fact in RULES[kind](scene, rng)] if len(pairs) < num_pairs else []
        facts = [fact for fact in found if fact is not None]
        if facts:
            fact = rng.choice(facts)
            questions, answers = phrasings("qa", "zh")[fact.phrasing]
            if wanted := asked(questions, fact, may_ask):
                pairs.append(QA(kind, rng.choice(wanted), rng.choice(answers).format(**fact.slots)))
    return pairs


def _chinese(fact: Fact, native: str) -> Fact | None:
    """The fact in Chinese, if the glossary knows its words and the native captions agree."""
    slots = fact.slots
    match fact.phrasing:
        case "colour" | "colours":
            return _filled("colour", native, thing=slots["thing"], colour=slots["colour"])
        case "count" | "count1":
            measure = {"measure": MEASURE.get(slots["thing"], "个"), "number": NUMBERS[slots["number"]]}
            filled = _filled("count", native, thing=slots["thing"])
            return filled and Fact("count", filled.slots | measure)
        case "animal" | "sport":
            name = {"animal": "thing", "sport": "sport"}[fact.phrasing]
            return _filled(fact.phrasing, native, **{name: slots[name]})
        case "where" | "wheres":
            return _filled("where", native, thing=slots["thing"], where=slots["where"])
        case "yes":
            return _filled("yes", native, thing=slots["bare"])
        case "no":
            word = GLOSSARY.get(slots["bare"])
            return Fact("no", {"thing": word[0]}) if word and not word[1].search(native) else None
        case "setting":
            return Fact("setting", {"setting": SETTINGS[slots["setting"]]})
    return None


def _filled(phrasing: str, native: str, **words: str) -> Fact | None:
    translated = {name: _translated(text, native) for name, text in words.items()}
    slots = {name: text for name, text in translated.items() if text is not None}
    return Fact(phrasing, slots) if len(slots) == len(words) else None


def _translated(text: str, native: str) -> str | None:
    """A phrase of words joined by "and", or "<owner>'s <thing>", if each of them is known and named in Chinese."""
    if "'s " in text:
        owner, _, thing = text.partition("'s ")
        parts, joint = [owner, thing], "的"
    else:
        parts, joint = text.split(" and "), "和"
    found = [GLOSSARY.get(part) for part in parts]
    if any(word is None or not word[1].search(native) for word in found):
        return None
    return joint.join(word[0] for word in found if word is not None)
