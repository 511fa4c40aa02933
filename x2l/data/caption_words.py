"""The small English lexicon that ``caption_qa`` reads captions with: plain word lists, for photos of everyday scenes."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLOURS = _words("black white brown red blue green yellow orange pink purple grey gray tan golden silver beige")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "2": 2, "3": 3, "4": 4, "5": 5}
NUMBER_NAMES = {1: "one", **{number: word for word, number in NUMBERS.items() if word.isalpha()}}
ONE = _words("a an one another the his her its their this that")

# What a noun stands for. Every singular has its plural right beside it.
PEOPLE = {
    "man": "man men guy guys gentleman gentlemen",
    "woman": "woman women lady ladies",
    "boy": "boy boys",
    "girl": "girl girls",
    "child": "child children kid kids toddler toddlers",
    "baby": "baby babies infant infants",
    "person": "person people adult adults teenager teenagers player players rider riders skateboarder skateboarders "
    "snowboarder snowboarders skier skiers surfer surfers biker bikers cyclist cyclists bicyclist bicyclists climber "
    "climbers hiker hikers swimmer swimmers runner runners dancer dancers motorcyclist motorcyclists racer racers worker "
    "workers goalie goalies cowboy cowboys bride brides singer singers guitarist guitarists performer performers athlete "
    "athletes kayaker kayakers wrestler wrestlers fisherman fishermen soldier soldiers officer officers musician "
    "musicians jogger joggers youth youths skater skaters diver divers pedestrian pedestrians vendor vendors driver "
    "drivers friend friends mother mothers father fathers dad dads mom moms son sons daughter daughters brother brothers "
    "sister sisters student students quarterback quarterbacks cheerleader cheerleaders golfer golfers wakeboarder "
    "wakeboarders bmxer bmxers gymnast gymnasts batter batters pitcher pitchers artist artists female females male males "
    "owner owners referee referees opponent opponents teammate teammates policeman policemen",
}
CROWDS = _words(
    "crowd crowds group groups others audience audiences spectators onlookers family families team teams band class "
    "bunch crew several many some couple couples pair pairs everyone bystanders gang lots various few parade"
)
NOT_PEOPLE = _words(
    "flowers sneakers trousers sweaters towers speakers trailers streamers feathers stickers letters papers waters colors "
    "outdoors indoors doors mirrors pants slippers rollers suspenders headers"
)
BUSY = _words(  # where captions leave out the people in the background
    "market street city sidewalk parade race racing game match concert stadium subway festival fair party competition "
    "tournament event mall store shop restaurant bar wedding court rugby basketball soccer football baseball hockey"
)
ANIMALS = {
    "dog": "dog dogs puppy puppies greyhound greyhounds retriever retrievers poodle poodles dalmatian dalmatians "
    "labrador labradors terrier terriers collie collies pup pups hound hounds dachshund dachshunds doggy doggies",
    "cat": "cat cats kitten kittens",
    "horse": "horse horses pony ponies",
    "bird": "bird birds seagull seagulls duck ducks pigeon pigeons goose geese",
    "cow": "cow cows",
    "bull": "bull bulls",
    "sheep": "sheep sheep lamb lambs",
    "goat": "goat goats",
    "elephant": "elephant elephants",
    "camel": "camel camels",
}
OBJECTS = _words(
    "ball frisbee car bike bicycle motorcycle motorbike boat kayak canoe raft umbrella truck bus slide balloon collar "
    "snowboard surfboard skateboard tent horse helmet leash jeep sled scooter wall building couch flag rope bucket door "
    "umbrella kite train guitar backpack bench blanket chair bag sign"
)
GARMENTS = _words(
    "shirt jacket hat dress coat shorts pants jeans suit vest sweater cap t-shirt sweatshirt swimsuit bikini helmet "
    "uniform skirt jersey scarf wetsuit costume glasses sunglasses goggles trunks bandanna headband boots"
)
PAIRED = _words("shorts pants jeans glasses sunglasses goggles trunks boots")  # plural in form, one in number
HOLDABLE = _words(
    "ball baby sign camera umbrella stick flag cup bottle microphone book bat racket frisbee guitar bag cigarette drink "
    "rope toy flower knife sword phone cellphone fish football basketball beer snowball paddle bone balloon surfboard "
    "skateboard snowboard dog puppy cat child pole hose bird racquet glass purse towel"
)
RIDEABLE = _words(
    "bike bicycle motorcycle motorbike horse skateboard scooter bull sled unicycle atv camel donkey tricycle elephant "
    "surfboard snowboard wave boogie-board swing carousel mower segway wheelchair raft kayak jetski bull toboggan"
)
# A noun before one of these is only part of another noun ("dog toy", "bike rider", "soccer player").
HEADS = _words(
    "toy toys collar house sled sleds race races racing track park show food bowl leash owner owners walker walkers team "
    "teams costume statue tag tags bed treat trainer rider riders player players stroller pool scouts scout game gear "
    "court field net rack rink ramp trail path course match field lot boarder boarding board boards carriage swing helmet "
    "jump jumping seat tire wheel trick tricks stunt hoop bat uniform holder goal coach station mask jersey fan fans "
    "walking hair head style paddle pack shirt agility hurdle obstacle fight fights"
)
NOT_REAL = _words("stuffed toy fake statue plastic hot inflatable painted cartoon drawing")

# Words that a noun phrase never holds; walking left from its noun stops here.
BOUNDARY = _words(
    "in on at by with of to from into onto over under through across along near behind beside between around down up off "
    "out about against towards toward above below past like is are was were be being has have had and or but while as who "
    "that which there next for during after before wearing holding carrying watching watches holds carries wears chases "
    "follows pulls pushes hugs catches takes rides riding chasing throws throwing throw jumps jumping kissing hugging "
    "petting feeding walks walking leads leading jumped tackles hits kicks kicking sees saw both helps shows gives not "
    "fighting biting bites facing following kiss hug grabs grabbing touches touching playing plays tackling pulling"
)

# Verbs that say what somebody is doing: base form, and how it takes -ing.
DOUBLING = _words("run sit swim hit dig jog grab skip spin flip hug pet chat hop slip tug shop nap surf_ clap")
ACTIONS = _words(
    "run play stand jump sit hold walk ride look climb swim smile carry pose watch race take chase lay hang talk make eat "
    "fly dance swing slide leap fight splash skateboard drink wait catch lean pull laugh fish throw surf lie read fall "
    "bite hike skate drive kick hug push blow dive smoke shake sleep snowboard wrestle stare cross point kiss wave chew "
    "wade rest roll paint dig grind shoot paddle lick sing float balance hit reach spin land bark kneel touch kayak sniff "
    "bike work fetch bounce jog row waterski gather follow pet tackle crouch box march retrieve speak perform pick dangle "
    "crawl cook wash clap cheer sprint gallop skip ski do drag cycle jump perch bend peek relax stretch sled fly"
) | _words("photograph juggle buck squat rappel scream yell toss bowl bat putt tug nap chat hop flip")
SAME_ACTION = {"leap": "jump", "race": "run", "sprint": "run", "lay": "lie", "bicycle": "bike", "gallop": "run"}

# place -> (nouns, prepositions, what the answer says)
PLACES: dict[str, tuple[str, str, str]] = {
    "beach": ("beach|seashore", "on|at|along|down|across", "on the beach"),
    "snow": ("snow", "in|on|through|across|over|down", "in the snow"),
    "pool": ("pool|swimming pool", "in|through", "in a pool"),
    "grass": ("grass|lawn", "in|on|through|across|over", "on the grass"),
    "field": ("field", "in|on|through|across|over", "in a field"),
    "street": ("street|road|crosswalk", "in|on|along|down|across", "on a street"),
    "sidewalk": ("sidewalk|pavement", "on|along|down", "on a sidewalk"),
    "park": ("(?<!skate )(?<!skateboard )(?<!amusement )park", "in|at|through", "in a park"),
    "woods": ("woods|forest", "in|through", "in the woods"),
    "water": ("water", "in|through", "in the water"),
    "ocean": ("ocean|sea|surf", "in|on", "in the ocean"),
    "lake": ("lake|pond", "in|on|through", "in a lake"),
    "river": ("river|stream|creek", "in|on|through|down|across", "in a river"),
    "sand": ("sand", "in|on|across|through", "on the sand"),
    "mountain": ("mountain|mountains|mountainside", "on|up|down|in", "on a mountain"),
    "rock": ("rock|cliff|rock wall", "on|up", "on a rock"),
    "playground": ("playground", "on|in|at", "at a playground"),
    "track": ("track|racetrack|raceway", "on|around|down", "on a track"),
    "yard": ("yard|backyard", "in|through|across", "in a yard"),
    "couch": ("couch|sofa", "on", "on a couch"),
    "bed": ("bed", "on|in", "on a bed"),
    "bench": ("bench", "on", "on a bench"),
    "stage": ("stage", "on", "on a stage"),
    "restaurant": ("restaurant|cafe|diner", "in|at", "in a restaurant"),
    "kitchen": ("kitchen", "in", "in a kitchen"),
    "trampoline": ("trampoline", "on", "on a trampoline"),
    "swing": ("swing", "on|in", "on a swing"),
    "trail": ("trail|path", "on|down|along", "on a path"),
    "stairs": ("stairs|steps|staircase", "on|down|up", "on the stairs"),
    "desert": ("desert", "in|through|across", "in the desert"),
    "train": ("subway|train", "on|in", "on a train"),
}
# A broader place gives way to a narrower one that the captions name as well.
NARROWER = {
    "water": ("pool", "ocean", "lake", "river"),
    "grass": ("field", "yard", "park"),
    "sand": ("beach", "desert"),
    "snow": ("mountain",),
}

OUTDOORS = _words(
    "beach snow snowy ocean lake river mountain mountains cliff field grass grassy lawn forest woods street sidewalk "
    "outside outdoors yard backyard trail desert sand sandy road playground hill sunset creek stream meadow snowbank"
)
INDOORS = _words(
    "inside indoors indoor room kitchen couch sofa bed bedroom carpet gym restaurant office hallway bathroom bathtub "
    "living bar store mall subway museum classroom arena"
)
SPORTS = {
    "soccer": r"soccer",
    "basketball": r"basketball",
    "tennis": r"tennis (?!ball)|tennis player",
    "baseball": r"baseball",
    "hockey": r"hockey",
    "volleyball": r"volleyball",
    "rugby": r"rugby",
    "football": r"(?:american )?football",
    "surfing": r"surf(?:ing|s|er|board)\b",
    "skiing": r"ski(?:ing|s|er|ers)?\b",
    "snowboarding": r"snowboard\w*",
    "skateboarding": r"skateboard\w*",
    "rock climbing": r"rock[ -]climb\w*|climb\w* (?:up )?(?:a|the) (?:\w+ )?(?:rock|cliff)",
}

_OTHERS = " someone somebody couple group team crowd family friends " + PEOPLE["person"]
_HE, _SHE = " he his him himself father dad son brother", " she her hers herself mother mom daughter sister"
_YOUNG = f"{PEOPLE['child']} {PEOPLE['baby']} teen teens"

# thing -> (how the question names it, words that name it, further words that forbid the answer "no", how much more often
# than others "no" is asked of it: fitted on Flickr8k's training photos so that "yes" and "no" are equally frequent for each)
PRESENCE: dict[str, tuple[str, str, str, int]] = {
    "dog": ("a dog", ANIMALS["dog"], "animal animals pet pets wolf beagle bulldog husky boxer shepherd collar", 163),
    "man": ("a man", PEOPLE["man"], PEOPLE["boy"] + _HE + _OTHERS, 10381),
    "woman": ("a woman", PEOPLE["woman"], PEOPLE["girl"] + _SHE + _OTHERS, 1360),
    "boy": ("a boy", PEOPLE["boy"], PEOPLE["man"] + _YOUNG + _HE + _OTHERS, 4459),
    "girl": ("a girl", PEOPLE["girl"], PEOPLE["woman"] + _YOUNG + _SHE + _OTHERS, 1831),
    "child": ("a child", _YOUNG, f"{PEOPLE['boy']} {PEOPLE['girl']} young little" + _OTHERS, 2415),
    "ball": ("a ball", "ball balls football basketball", "soccer tennis baseball volleyball game sport sports toy bat", 38),
    "frisbee": ("a frisbee", "frisbee frisbees", "disc disk toy ring catch", 4),
    "bicycle": ("a bicycle", "bicycle bicycles bike bikes", "biker cyclist bicyclist bmx cycle cycling unicycle riding", 24),
    "motorcycle": ("a motorcycle", "motorcycle motorcycles motorbike", "bike bikes biker motocross motorcyclist rider", 6),
    "car": ("a car", "car cars", "vehicle vehicles jeep truck traffic street road race racing parking taxi driving", 9),
    "boat": ("a boat", "boat boats", "canoe kayak raft ship vessel rowing harbor dock kayaking paddling sail", 5),
    "horse": ("a horse", ANIMALS["horse"], "animal animals rodeo bull cowboy carriage riding jockey", 6),
    "bird": ("a bird", ANIMALS["bird"], "animal animals wings fly", 5),
    "cat": ("a cat", ANIMALS["cat"], "animal animals pet", 1),
    "skateboard": ("a skateboard", "skateboard skateboards", "skateboarder skater skate skateboarding skating board trick", 10),
    "surfboard": ("a surfboard", "surfboard surfboards", "surfer surfing surf surfs wave waves board boogie", 2),
    "snowboard": ("a snowboard", "snowboard snowboards", "snowboarder snowboarding snow skier ski board slope", 2),
    "guitar": ("a guitar", "guitar guitars", "band music instrument instruments guitarist musician musicians", 2),
    "umbrella": ("an umbrella", "umbrella umbrellas", "parasol rain", 1),
    "bench": ("a bench", "bench benches", "seat sitting sits sit seated", 5),
    "snow": ("snow", "snow", "snowy ice icy winter ski skis skier skiing snowboarder sled snowboard mountain", 24),
    "water": ("water", "water ocean lake river pool", "sea pond creek stream wave waves beach surf swim swimming swims "
              "splash splashes splashing fountain wet boat kayak puddle shore bath sprinkler hose dock canoe raft", 56),
    "beach": ("a beach", "beach", "sand sandy ocean sea shore coast waves surf water", 12),
    "swimming pool": ("a swimming pool", "pool", "water swim swimming swims dive diving slide splash", 5),
    "trampoline": ("a trampoline", "trampoline", "bouncing bounce", 1),
    "fountain": ("a fountain", "fountain fountains", "water sprinkler spray", 2),
    "fence": ("a fence", "fence", "fenced railing gate yard rail", 4),
}  # fmt: skip
