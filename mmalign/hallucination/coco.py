"""The 80 object classes of COCO and the words by which captions name them.

One entry per class: its name, then words for it. A word belongs to one class. Words that mostly
mean something else in captions are left out ("couple" of birds, "female" elephant, "baseball"
game), except where the class name itself is one ("orange", "mouse", "remote").
"""

from __future__ import annotations

_PEOPLE = """
person: people, human, man, woman, boy, girl, child, kid, baby, infant, toddler, teenager, teen,
    adult, guy, lady, gentleman, mother, father, mom, dad, parent, son, daughter, brother,
    sister, grandmother, grandfather, bride, groom, worker, officer, policeman, policewoman,
    cop, firefighter, fireman, soldier, chef, baker, waiter, waitress, bartender, doctor, nurse,
    student, teacher, farmer, cowboy, sailor, businessman, businesswoman, player, pitcher,
    catcher, umpire, referee, athlete, skier, snowboarder, skater, skateboarder, surfer,
    swimmer, rider, cyclist, bicyclist, biker, motorcyclist, jockey, driver, passenger,
    pedestrian, traveler, tourist, shopper, vendor, spectator, bystander, camper, hiker, hunter,
    fisherman, villager
"""
_VEHICLES = """
bicycle: bike, tricycle, unicycle
car: automobile, sedan, suv, van, minivan, hatchback, coupe, convertible, jeep, taxi, taxicab,
    cab, limousine, limo
motorcycle: motorbike, motor bike, motor cycle, moped, scooter, dirt bike
airplane: plane, aeroplane, air plane, aircraft, jet, airliner, jetliner, jumbo jet, biplane,
    seaplane, monoplane, airbus
bus: minibus, double decker, trolleybus, trolley
train: locomotive, subway train, tram, tramway, streetcar, caboose
truck: pickup, pickup truck, lorry, firetruck, fire truck, semi truck, tow truck, dump truck
boat: ship, sailboat, rowboat, motorboat, speedboat, lifeboat, houseboat, fishing boat, canoe,
    kayak, yacht, dinghy, raft, ferry, ferryboat, barge, tugboat, trawler, gondola, catamaran,
    schooner, steamboat, freighter, vessel, watercraft, skiff
"""
_STREET = """
traffic light: traffic signal, stop light, stoplight, street light, streetlight
fire hydrant: hydrant
stop sign: stopsign
parking meter:
bench: pew
"""
_ANIMALS = """
bird: seagull, gull, pigeon, dove, duck, duckling, mallard, goose, gosling, swan, owl, eagle,
    hawk, falcon, osprey, vulture, condor, buzzard, crow, raven, magpie, sparrow, robin, finch,
    warbler, oriole, blackbird, bluebird, hummingbird, woodpecker, kingfisher, parrot, parakeet,
    macaw, cockatoo, cockatiel, flamingo, heron, egret, stork, pelican, cormorant, puffin,
    penguin, ostrich, peacock, peafowl, pheasant, quail, turkey, rooster, hen, fowl, waterfowl,
    seabird, shorebird, songbird, waterbird, sandpiper, loon
cat: kitten, kitty, feline, tabby
dog: puppy, pup, doggy, doggie, canine, hound, mutt, beagle, bulldog, chihuahua, collie, corgi,
    dachshund, dalmatian, doberman, greyhound, husky, labrador, pitbull, poodle, pug, retriever,
    rottweiler, schnauzer, sheepdog, spaniel, terrier, weimaraner, whippet
horse: pony, foal, colt, filly, mare, stallion, mustang, bronco, racehorse, equine
sheep: lamb, ewe, ram, goat
cow: cattle, calf, bull, ox, heifer, bison, buffalo, holstein
elephant:
bear: panda, grizzly
zebra:
giraffe:
"""
_BELONGINGS = """
backpack: knapsack, rucksack
umbrella: parasol
handbag: hand bag, purse, wallet, briefcase
tie: necktie, bow tie, bowtie
suitcase: suit case, luggage
frisbee:
skis: ski
snowboard:
sports ball: ball, soccer ball, tennis ball
kite:
baseball bat:
baseball glove: baseball mitt, catcher mitt
skateboard:
surfboard: surf board, longboard, shortboard, wakeboard, bodyboard
tennis racket: racket, racquet, tennis racquet
"""
_KITCHEN = """
bottle:
wine glass: wineglass, wine goblet
cup: mug, teacup
fork:
knife: pocketknife
spoon: teaspoon, tablespoon
bowl:
banana:
apple:
sandwich: burger, hamburger, cheeseburger, panini
orange:
broccoli:
carrot:
hot dog: hotdog
pizza:
donut: doughnut, bagel
cake: cupcake, cheesecake, shortcake, coffeecake, pancake
"""
_HOME = """
chair: armchair, seat, stool, barstool, rocking chair
couch: sofa, loveseat, settee, futon, recliner, chesterfield
potted plant: houseplant, house plant
bed: bunk bed
dining table: table, desk, kitchen table, coffee table
toilet: urinal, commode, lavatory, potty
tv: television, tv set, television set, monitor
laptop: laptop computer, notebook computer, netbook, macbook, computer
mouse: computer mouse
remote: remote control
keyboard: computer keyboard
cell phone: cellphone, mobile phone, smartphone, phone, telephone, iphone
microwave: microwave oven
oven: stove, stovetop
toaster:
sink: washbasin
refrigerator: fridge, freezer
book:
clock:
vase:
scissors: scissor
teddy bear: teddybear, teddy
hair drier: hair dryer, hairdryer, blow dryer
toothbrush: tooth brush
"""


def _read(text: str) -> dict[str, tuple[str, ...]]:
    joined = text.replace("\n    ", " ").strip()
    found = {}
    for line in joined.split("\n"):
        name, _, words = line.partition(":")
        found[name] = tuple(word.strip() for word in words.split(",") if word.strip())
    return found


COCO_WORDS: dict[str, tuple[str, ...]] = {
    name: words
    for part in (_PEOPLE, _VEHICLES, _STREET, _ANIMALS, _BELONGINGS, _KITCHEN, _HOME)
    for name, words in _read(part).items()
}
"""Class name -> other words for it."""

YOUNG_OR_GROWN = ("baby", "adult")
ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)
REPLACED: dict[str, str] = {
    **{f"{age} {animal}": animal for age in YOUNG_OR_GROWN for animal in ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
    "bow tie": "tie",
    # Neither a dining plate nor a train is there; both phrases name no class.
    "home plate": "home plate",
    "train track": "train track",
}
"""Two words that mean one: a "baby elephant" is no person. CHAIR's rules."""
