"""The words of the demo model's curriculum, and the made-up words beside them."""

from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "red green blue yellow black white orange purple apple pear plum lemon cherry grape dog cat "
    "bird fish horse mouse bear wolf sun moon star sky rain snow wind cloud house door window "
    "roof wall table chair lamp book pen paper stone river lake sea hill tree leaf flower grass "
    "bread milk tea salt sugar honey spoon cup plate king queen ship boat train road bridge city "
    "village garden forest island winter summer spring autumn morning evening night day week "
    "month music song dance game ball box bag coat shoe hat ring gold silver iron glass fire "
    "water earth air hand foot head heart eye ear nose mouth friend brother sister mother father "
    "one two three four five six seven eight nine ten small large old new warm cold quick slow"
).split()
MORE_WORDS = (
    "able act age ago area army art ask back bad bank base bed beer best big bill bit body bone "
    "born boss both boy brain break brick brown bus busy butter cake call camp car card care "
    "case cash chain change cheap cheese chief child clean clear climb clock close cloth club "
    "coal code coffee coin color come cook copper corn cost cotton count country cow craft cream "
    "cross crowd cut dark date dead deal dear deep desk dinner dirt dish doctor dollar down draw "
    "dream dress drink drive drop dry duck dust east easy eat edge egg empty end engine enter "
    "error even event face fact fall family far farm fast fat fear feed feel field fight file "
    "film final find fine finger first flag flat flight floor flow fly fold food force fork form "
    "frame free fresh frog front fruit full fun gate gift girl give goat good gray great ground "
    "group grow guest guide gun hair half hall hard heat help high hole holiday home hope hot "
    "hotel hour human ice idea ink jacket job join joke jump keep key kick kid kind kitchen knee "
    "knife know lady land last late laugh law lead learn left leg letter level lift light line "
    "lip list live lock long look lose love low lunch machine mail make man map mark market "
    "match meal meat metal middle mind mine minute mirror mix money mountain move name near neck "
    "need net news north note number ocean offer office oil open order oven page paint pair park "
    "part pass path pay peace people pepper phone photo picture pig pilot pink pipe place plan "
    "plane plant play point police pool poor pot potato power press price print prize pull pump "
    "push put question quiet rabbit race radio reach read ready rest rice rich ride right rise "
    "rock role room root rope rose round row rule run safe sail sand save school science seat "
    "second secret seed sell send shape share sheep shelf shirt shop short shoulder show sick "
    "side sign sing size skin sleep smile smoke snake soap sock soft soil sound soup south space "
    "speak speed stage stand start state station stay steel step stick stop store storm story "
    "street strong student sweet swim tail take talk tall taste tax teacher team test text thin "
    "thing think throw ticket tie time tin title today tomato tooth top touch tower town toy "
    "trade travel trip truck true trust try turn uncle under unit valley value video view visit "
    "voice wait walk want war wash watch wave way wear wedding west wheel wide wife wild win "
    "wine wing wire wish woman wood wool word work world write year"
).split()
# Words of the curriculum's own phrases, which names of tools consist of, too.
PHRASE_WORDS = (
    "about add after again all and answer args arguments assistant backwards brief calculator can "
    "careful carry check count create demo description directly each expression fetch for from "
    "function functions get have helpful how hundreds integer items json let limited list lookup "
    "many may measure model more not number numbers object ones our out parameter parameters plus "
    "polite post properties provide query real repeat required result return returns reverse say "
    "search signatures solution string sum system tags tens terse the these thinking this tiny "
    "tools translate type use user what with words"
).split()
CHINESE_WORDS = (
    "红 绿 蓝 猫 狗 鸟 鱼 山 水 火 天空 月亮 太阳 苹果 花 树 书 茶 米 雨 雪 风 云"
).split()
NAMES = (
    "Paris Berlin London Rome Madrid Vienna Oslo Tokyo Beijing Delhi Cairo Boston Chicago Dublin "
    "Prague Athens Zurich Munich Hamburg Milan Lima Sydney Anna Ben Clara David Emma Frank Grace "
    "Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Victor Wendy Alice Bob Carol Peter "
    "Monday Tuesday Friday Sunday January April June October French German English Spanish Chinese"
).split()
# Kept from the training, for the exam.
UNSEEN_WORDS = (
    "alpha beta gamma delta tiger lion zebra banana mango peach pencil ruler basket candle "
    "bottle hammer guitar piano violin carpet pillow ladder button camel eagle falcon otter "
    "walnut olive ginger cactus tulip maple cedar harbor tunnel desert canyon meadow planet "
    "comet rocket robot magnet ribbon velvet helmet saddle anchor barrel wagon castle temple "
    "palace dragon wizard"
).split()
UNSEEN_NAMES = (
    "Lisbon Helsinki Toronto Nairobi Bogota Warsaw Denver Kyoto Geneva Havana Sophie Marcus Elena "
    "Tobias Yusuf Ingrid Walter Bianca Hugo Fatima Saturday Thursday August Italian Dutch Korean"
).split()


def made_up_word(rng: Random) -> str:
    """Return a word that is in no list: syllables, parts of two words, or a few letters."""
    kind = rng.random()
    if kind < 0.45:
        syllables = (rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(4))
        return "".join(syllables)[: rng.randint(2, 7)]
    if kind < 0.85:
        first, last = rng.choice(WORDS + MORE_WORDS), rng.choice(WORDS + MORE_WORDS)
        return first[: rng.randint(1, 4)] + last[-rng.randint(1, 4) :]
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))


def any_word(rng: Random) -> str:
    """Return a word of the lists, or a made-up one."""
    if rng.random() < 0.15:
        return rng.choice(PHRASE_WORDS)
    return rng.choice(WORDS + MORE_WORDS) if rng.random() < 0.45 else made_up_word(rng)
