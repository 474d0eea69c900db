"""The demo's rows: spoken requests, each with the one JSON command a home assistant should run for it.

Fine-tuning is worth showing only where the score before is honestly low and the score after can be checked by a
program. A base model cannot know this command language (its actions, keys and their order are ours), and an answer is
right only as the exact string. Training and eval rows share no sentence frame and no slot value, not even a word
of one (messages apart, which are compared whole), so a right answer is understood and copied, never remembered.

The eval words keep one more rule, learned from the mistakes on an earlier set of them: after a quote, as JSON
writes them, they take no more tokens of SmolLM2's than after a space. Other words come apart behind the quote, and a
model of 135 million parameters then spells a neighbor (Manchester for Milan). All eval words were chosen by this
rule, none by the answer it got; training values do not follow it. So the score is for copying everyday words.

Every sentence here is our own. Frames and values are the tables below; `demo_rows` only combines them. What it leaves
out: requests that lack a value, and requests that are no command at all.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SYSTEM_MESSAGE = "Answer with a JSON command."

TRAIN_ROWS_PER_ACTION = 96
EVAL_ROWS_PER_ACTION = 10


class Values(NamedTuple):
    """The values of one slot. Integers are written as digits in the request and as numbers in the command."""

    train: tuple[str | int, ...]
    eval: tuple[str | int, ...]


class Action(NamedTuple):
    """One command: its keys after "action", in their order, with the slot that fills each, and its sentences."""

    slots: dict[str, str]
    train_frames: tuple[str, ...]
    eval_frames: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in text.split(","))


EVAL_NUMBERS = (4, 7, 9, 13, 24, 28, 36, 41, 44, 47, 52, 58, 61, 63, 69, 74, 78, 85, 92, 97)

# Many training values, most used once or twice: a slot whose values come back often is trained by heart, not copied.
VALUES: dict[str, Values] = {
    "number": Values(
        train=tuple(n for n in range(2, 100) if n not in EVAL_NUMBERS),
        eval=EVAL_NUMBERS,
    ),
    "day": Values(
        train=("Monday", "Tuesday", "Thursday", "Saturday", "Sunday"),
        eval=("Wednesday", "Friday"),
    ),
    "time": Values(
        train=_split(
            "5:15, 5:50, 6:05, 6:20, 6:45, 7:00, 7:25, 7:40, 8:10, 8:35, 8:55, 9:20, 9:45, 10:05, 10:30, 11:15, "
            "11:50, 12:10, 12:45, 13:05, 13:30, 14:20, 14:55, 15:10, 15:40, 16:25, 17:05, 17:50, 18:15, 18:40, "
            "19:00, 19:35, 20:10, 20:45, 21:20, 21:55, 22:05, 22:30, 23:15, 23:40"
        ),
        eval=_split("5:35, 6:30, 7:10, 7:55, 8:20, 9:05, 10:50, 11:25, 12:30, 20:15"),
    ),
    "label": Values(
        train=_split(
            "rice, pasta, pizza, laundry, yoga, homework, soup, boiled eggs, green tea, bread dough, dishwasher, "
            "nap, roast chicken, potatoes, meditation, chess, cookies, piano practice, face mask, charcoal grill, "
            "lentils, hair dye, reading, stretching, cheesecake, video call, washing machine, steak, garden hose, "
            "parking meter, oatmeal, muffins, chicken wings, pancakes, sauce, brownies, plank, spelling test, "
            "guitar lesson, bath, coffee break, study session, lasagna, risotto, dumplings, broccoli, banana "
            "bread, shower, board game, presentation, ironing, jam, wet paint, glue, jogging, choir, popcorn, "
            "kettle, casserole, sourdough, turnips, speech, debate, handstand, knitting, sudoku, stew, fudge, "
            "granola, gardening"
        ),
        eval=_split("oven, apple pie, exercise, beans, gravy, project, writing, fire drill, waffles, jigsaw puzzle"),
    ),
    "room": Values(
        train=_split(
            "kitchen, bedroom, hallway, garage, attic, study, nursery, pantry, living room, guest room, "
            "staircase, cellar, terrace, laundry room, entrance, workshop, library, playroom, front porch, "
            "wardrobe, sauna, shed, dressing room, landing, studio, courtyard, closet, hall, conservatory, den, "
            "loft, veranda, barn, chapel, gallery, kiosk, reading corner, breakfast nook, corridor, patio, "
            "driveway, carport, music room, sewing room, utility room, back yard, foyer, reception, wine cellar, "
            "darkroom, pool house, garden path, meeting room, classroom, canteen, stable, cabin, archive, "
            "pavilion, boiler room, bay window, stairwell, lounge, tower, vault"
        ),
        eval=_split("office, lab, bar, stage, main floor, stairs, north wing, farm, middle floor, safe"),
    ),
    "artist": Values(
        train=_split(
            "Silver Harbor, Nina Brandt, The Paper Kites Club, Velvet Engine, Oskar Lind, Blue Lanterns, Marble "
            "Foxes, Tara Quinn, Electric Orchard, Northern Radio, Juno Vale, The Copper Wolves, Salt Cathedral, "
            "Mira Santos, Golden Arcade, Wild Cassette, Leo Ferrante, The Quiet Machines, Amber Tide, Rusty "
            "Comets, Delta Parade, Ivy Monroe, Glass Rivers, Hollow Pines, Sonja Kral, Midnight Bakery, The Lost "
            "Umbrellas, Papaya, Zephyr, Kestrel, Broken Mirrors, Rafael Ortega, Distant Avenue, Frozen Sparrows, "
            "Lucky Theory, Greta Holm, Purple Giants, Secret Circus, Tremolo, Nimbus, Bravado, Ondine, Karim "
            "Haddad, Desert Pianos, Polite Robots, The Sunday Sailors, Clara Whitfield, Burning Maps, Cobalt, Tin "
            "Soldiers, Emil Novotny, Lemon Drive, Starling, Hidden Valley, Yara Costa, Steel Daisies, Fever "
            "Garden, Otto Blum, Echo Street, Panther Lane, Wooden Hearts, Misty Canyon, Anika Rao, Ghost Ferry, "
            "Rocket Aunt"
        ),
        eval=_split(
            "Winter Tigers, Falling Satellites, Violet, White Rabbits, Sarah Bell, Robert King, Natural Order, "
            "Space Crew, Fire Island, Modern Knights"
        ),
    ),
    "device": Values(
        train=_split(
            "soundbar, tablet, laptop, phone, television, headphones, kitchen speaker, desktop, stereo, radio, "
            "earbuds, car system, projector, smart clock, jukebox, record player, console, bookshelf speaker, "
            "intercom, turntable, media center, headset, alarm clock, tape deck, home cinema, notebook, party "
            "speaker, doorbell, shower speaker, mini speaker, game console, sound dock, wall panel, smart mirror, "
            "docking station, dashboard, megaphone, wireless pods, synthesizer, big screen, smart lamp, computer, "
            "music box, ceiling speaker, hearing aid, robot, fridge, glasses, web player, piano"
        ),
        eval=_split(
            "monitor, receiver, subwoofer, smartwatch, gramophone, boombox, bluetooth cube, karaoke kit, display, "
            "digital frame"
        ),
    ),
    "item": Values(
        train=_split(
            "oat milk, bananas, batteries, olive oil, sunscreen, paper towels, garlic, tent pegs, toothpaste, "
            "butter, rain jacket, light bulbs, dog food, cinnamon, sponges, red onions, candles, screws, wool "
            "socks, matches, brown sugar, cucumbers, tape, envelopes, yoghurt, water bottle, black pepper, "
            "shampoo, chickpeas, rope, flour, cat litter, mustard, tissues, sandpaper, balloons, maple syrup, "
            "lettuce, pencils, frozen peas, vinegar, scissors, hand cream, walnuts, ketchup, raisins, oranges, "
            "dish soap, lip balm, almonds, tuna, printer paper, basil, stamps, blankets, peanut butter, cocoa, "
            "hiking boots, swimsuit, camera, passport, ginger, mushrooms, ice cubes, cheddar, grapes, crackers, "
            "bin bags, lamp oil, first aid box"
        ),
        eval=_split("meat, fish, apples, corn, books, nuts, seeds, plastic cups, fresh fruit, gold ribbon"),
    ),
    "list": Values(
        train=_split(
            "shopping, camping, party, hardware, packing, pharmacy, birthday, weekend, grocery, stationery, "
            "holiday, market, picnic, wedding, school, baby, kitchen, renovation, beach, ski trip, garden, "
            "cleaning, supermarket, vacation, repair, cooking, hospital, bakery, road trip, workshop, breakfast, "
            "dinner, summer, wine, pet, sports, gifts, sailing, craft, monthly, family, medicine, clothes, "
            "emergency, fishing, spring, drinks, art class, dessert, charity"
        ),
        eval=_split("travel, moving, errands, personal, business, winter, health, team, training, client"),
    ),
    "person": Values(
        train=_split(
            "Anna, Tom, Priya, Carlos, Grandma, Yusuf, Lena, Mr Becker, Chloe, Ivan, Sofia, Daniel, Aisha, Uncle "
            "Ray, Marta, Kenji, Olivia, Ben, Dr Patel, Fatima, Jonas, Ella, Victor, Mum, Samir, Nadia, Coach "
            "Lewis, Pete, Ingrid, Maria, Ahmed, Aunt Sue, Lucas, Hannah, Wei, Dmitri, Zoe, Captain Moss, Gabriel, "
            "Amara, Finn, Julia, Omar, Professor Klein, Isabel, Noah, Keiko, Stefan, Ruth, Dad, Bruno, Leila, "
            "Oscar, Tanya, Mrs Green, Paulo, Emma, Rahul, Simon, Vera, Walter, Judge Ortiz, Camille, Adam, Sven, "
            "Monica, George, Lily, Arjun, Beatrice"
        ),
        eval=_split("Malik, Grandpa, Miss Novak, Theo, Cousin Eddie, Sanjay, Michael, Alice, Jack, Peter"),
    ),
    "text": Values(
        train=_split(
            "I am running late, dinner is ready, call me back, the train is delayed, happy birthday, see you "
            "soon, bring the charger, we won the game, I found your keys, lunch was great, the meeting moved, I "
            "am home, thanks for the ride, do not wait for me, pick up the kids, the parcel arrived, I need the "
            "address, good luck today, the dog is fine, I will be there, please feed the cat, the door is open, "
            "miss you, the report is done, it is snowing here, I lost my wallet, the flight landed, sleep well, "
            "tickets are booked, I missed the bus, the cake is perfect, turn off the stove, we are at the "
            "station, the movie starts soon, I can not come, the doctor called, check your email, the soup is "
            "cold, they said yes, I bought flowers, the bike is fixed, my phone is dead, the shop is closed, "
            "welcome back, I passed the exam, the kids are hungry, come over tonight, the water is hot, my shift "
            "is over, grandma says hello, I have the tickets, the room is ready, stay where you are, the band is "
            "playing, your turn to cook"
        ),
        eval=_split(
            "I am on my way, the car broke down, congratulations, we are out of bread, the baby is asleep, save "
            "me a seat, practice is canceled, I left my umbrella, the taxi is outside, please be quick"
        ),
    ),
    "place": Values(
        train=_split(
            "Oslo, Madrid, Toronto, Nairobi, Kyoto, Berlin, Lima, Cape Town, Dublin, Vienna, Hanoi, New York, "
            "Prague, Sydney, Chicago, Cairo, Lyon, Porto, San Jose, Mumbai, Helsinki, Athens, Bogota, Naples, "
            "Hong Kong, Tunis, Boston, Geneva, Krakow, Rio, Zagreb, Austin, Rome, Tokyo, London, Paris, Havana, "
            "Bergen, Tel Aviv, Manila, Seattle, Quito, Leeds, Osaka, Dakar, Munich, Santa Fe, Perth, Montreal, "
            "Bristol, Accra, Valencia, Riga, Dallas, Salt Lake City, Turin, Shanghai, Bern, Kampala, Ottawa, "
            "Bruges, Panama City, Delhi, Cork, Phoenix, Utrecht, Malaga, Sofia, Hamburg, Nantes"
        ),
        eval=_split(
            "Los Angeles, Washington, Oxford, Cambridge, Little Rock, Mexico, Florida, California, Madison, Lincoln"
        ),
    ),
}

# A slot in braces takes a value of the table above. Eval frames say the same things in other words. No frame starts
# with a slot, so that every value is written in the request as it is in the command.
ACTIONS: dict[str, Action] = {
    "set_timer": Action(
        slots={"minutes": "number", "label": "label"},
        train_frames=(
            "Set a timer for {number} minutes for the {label}.",
            "Start a {number} minute timer called {label}.",
            "I need a {label} timer, {number} minutes please.",
            "Count down {number} minutes for {label}.",
            "Timer for {label}: {number} minutes.",
            "Could you time the {label} for {number} minutes?",
            "Begin a countdown of {number} minutes named {label}.",
            "Give me {number} minutes on the clock for {label}.",
            "The {label} takes {number} minutes, start the timer.",
            "Put {number} minutes on a timer, label it {label}.",
            "Please run a timer of {number} minutes, it is for {label}.",
            "New {label} countdown lasting {number} minutes.",
            "For the {label}, set {number} minutes on the timer.",
            "My {label} should be done in {number} minutes, count them.",
            "Time {number} minutes of {label}.",
        ),
        eval_frames=(
            "Set up a {label} timer that lasts {number} minutes.",
            "I would like {number} minutes on the {label} timer.",
            "Start timing {number} minutes now, it is for {label}.",
            "Create a timer with the name {label} and {number} minutes.",
            "Let the timer run {number} minutes for my {label}.",
        ),
    ),
    "set_alarm": Action(
        slots={"time": "time", "day": "day"},
        train_frames=(
            "Wake me at {time} on {day}.",
            "Set an alarm for {day} at {time}.",
            "I have to get up at {time} on {day}.",
            "On {day} my alarm should ring at {time}.",
            "Alarm at {time}, {day} please.",
            "Can you wake me up on {day}, at {time} sharp?",
            "Please put an alarm on {day} for {time}.",
            "Get me out of bed at {time} this {day}.",
            "The {day} alarm is at {time}.",
            "Make the alarm go off at {time} on {day}.",
            "I want to be awake by {time} on {day}.",
            "Create a {day} wake-up alarm for {time}.",
            "Schedule an alarm, {day}, {time}.",
            "It is early on {day}, wake me at {time}.",
            "Ring the alarm this {day} when it is {time}.",
        ),
        eval_frames=(
            "For {day} I want the alarm clock to ring at {time}.",
            "I need to wake up at {time} next {day}.",
            "Add an alarm, {time}, for {day} morning.",
            "Please get me up on {day}, the alarm is for {time}.",
            "Let the alarm wake me {day} at {time}.",
        ),
    ),
    "set_light": Action(
        slots={"room": "room", "brightness": "number"},
        train_frames=(
            "Set the {room} light to {number} percent.",
            "Dim the {room} to {number} percent.",
            "Turn the lamps in the {room} up to {number} percent.",
            "I want {number} percent light in the {room}.",
            "Lights in the {room} at {number} percent, please.",
            "Make the {room} {number} percent bright.",
            "Could you lower the {room} lights to {number} percent?",
            "Brightness {number} percent for the {room}.",
            "Change the lighting in the {room} to {number} percent.",
            "The {room} is too dark, go to {number} percent.",
            "Put the {room} lamp on {number} percent.",
            "Give the {room} {number} percent brightness.",
            "Bring the light of the {room} down to {number} percent.",
            "At night the {room} needs {number} percent light.",
            "Increase the {room} lamps to {number} percent.",
        ),
        eval_frames=(
            "Adjust the light in my {room}, {number} percent please.",
            "Could the {room} lamps go to {number} percent?",
            "Raise the {room} brightness up to {number} percent.",
            "I would like the {room} lit at {number} percent.",
            "Lower the lamp of the {room} until {number} percent.",
        ),
    ),
    "play_music": Action(
        slots={"artist": "artist", "device": "device"},
        train_frames=(
            "Play {artist} on the {device}.",
            "I want to hear {artist} on my {device}.",
            "Put on some {artist}, use the {device}.",
            "Start {artist} songs on the {device}.",
            "On the {device}, play something by {artist}.",
            "Can the {device} play {artist}?",
            "Music by {artist} on the {device}, please.",
            "Let me listen to {artist} through the {device}.",
            "Use my {device} to play {artist}.",
            "Stream {artist} to the {device}.",
            "Shuffle {artist} on the {device}.",
            "Give us a track by {artist} over the {device}.",
            "Could you put {artist} on the {device} now?",
            "The {device} should play the new album of {artist}.",
            "Some {artist} would be nice, on the {device}.",
        ),
        eval_frames=(
            "Could you play songs from {artist} on my {device}?",
            "I would love some {artist} music on the {device}.",
            "Put {artist} on, I am listening with the {device}.",
            "Have the {device} play an album by {artist}.",
            "Begin playing {artist}, the sound goes to the {device}.",
        ),
    ),
    "add_item": Action(
        slots={"item": "item", "list": "list"},
        train_frames=(
            "Add {item} to the {list} list.",
            "Put {item} on my {list} list.",
            "We need {item}, note it on the {list} list.",
            "The {list} list should include {item}.",
            "Write {item} down on the {list} list.",
            "On the {list} list, add {item}.",
            "Please add {item} to our {list} list.",
            "Can you put {item} onto the {list} list?",
            "My {list} list needs {item}.",
            "I am out of {item}, add it to the {list} list.",
            "Remember {item} for the {list} list.",
            "New entry for the {list} list: {item}.",
            "We forgot {item} on the {list} list, add it.",
            "Get {item} onto our {list} list.",
            "Could {item} go on the {list} list?",
        ),
        eval_frames=(
            "Include {item} in the {list} list.",
            "The {list} list is still missing {item}.",
            "Make sure {item} is on our {list} list.",
            "I also need {item}, please put that on the {list} list.",
            "Could you write {item} on our {list} list?",
        ),
    ),
    "send_message": Action(
        slots={"to": "person", "text": "text"},
        train_frames=(
            "Tell {person}: {text}.",
            "Send {person} a message saying {text}.",
            "Text {person} that {text}.",
            "Message {person}: {text}.",
            "Let {person} know that {text}.",
            "Write to {person}: {text}.",
            "Can you send a text to {person}? Say {text}.",
            "Send '{text}' to {person}.",
            "Please tell {person} that {text}.",
            "New message for {person}: {text}.",
            "I want to message {person} that {text}.",
            "Drop {person} a note saying {text}.",
            "Could you tell {person} that {text}?",
            "Say to {person} that {text}.",
            "Reply to {person} with '{text}'.",
        ),
        eval_frames=(
            "Could you message {person} and say that {text}?",
            "A quick message to {person} please: {text}.",
            "Send this text to {person}: {text}.",
            "I need to tell {person} that {text}.",
            "Write {person} a message: {text}.",
        ),
    ),
    "get_weather": Action(
        slots={"place": "place", "day": "day"},
        train_frames=(
            "What is the weather in {place} on {day}?",
            "Will it rain in {place} on {day}?",
            "Weather for {place}, {day}.",
            "How cold will {place} be on {day}?",
            "Give me the {day} forecast for {place}.",
            "On {day}, is it sunny in {place}?",
            "Do I need an umbrella in {place} this {day}?",
            "Tell me the forecast for {place} on {day}.",
            "Is snow expected on {day} in {place}?",
            "Check {place} weather for {day}.",
            "How warm does it get in {place} on {day}?",
            "I am visiting {place} on {day}, what will the weather be?",
            "Are there storms in {place} on {day}?",
            "Show the weather for {day}, place {place}.",
            "Could you say how windy {place} is on {day}?",
        ),
        eval_frames=(
            "What kind of weather will {place} have on {day}?",
            "Look up the {day} weather forecast in {place}.",
            "Is rain coming to {place} on {day}?",
            "How is the weather going to be {day} in {place}?",
            "Will {day} be hot in {place}?",
        ),
    ),
}

Row = dict[str, list[dict[str, str]]]


def demo_rows(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and eval rows, each {"messages": [system, user, assistant]}; equal seeds give equal rows."""
    train_frames = {name: action.train_frames for name, action in ACTIONS.items()}
    train_values = {slot: values.train for slot, values in VALUES.items()}
    eval_frames = {name: action.eval_frames for name, action in ACTIONS.items()}
    eval_values = {slot: values.eval for slot, values in VALUES.items()}
    return (
        _rows(train_frames, train_values, TRAIN_ROWS_PER_ACTION, f"train {seed}"),
        _rows(eval_frames, eval_values, EVAL_ROWS_PER_ACTION, f"heldout {seed}"),
    )


def _rows(
    frames: dict[str, tuple[str, ...]],
    values: dict[str, tuple[str | int, ...]],
    rows_per_action: int,
    seed: str,
) -> list[Row]:
    """Different rows in a random order; an action's frames, and a slot's values, are used equally often."""
    next_frame = {name: _evenly(choices, f"{seed} {name}") for name, choices in frames.items()}
    next_value = {slot: _evenly(choices, f"{seed} {slot}") for slot, choices in values.items()}
    commands: dict[str, str] = {}
    for name, action in ACTIONS.items():
        wanted = len(commands) + rows_per_action
        while len(commands) < wanted:
            chosen = {slot: next(next_value[slot]) for slot in action.slots.values()}
            request = next(next_frame[name]).format(**chosen)
            command = {"action": name} | {key: chosen[slot] for key, slot in action.slots.items()}
            commands[request] = json.dumps(command, ensure_ascii=False, separators=(",", ":"))
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM_MESSAGE},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }
        for request, answer in commands.items()
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _evenly(choices: tuple[Any, ...], seed: str) -> Iterator[Any]:
    """Endless choices: every one once, in a random order, before any comes again."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(choices, len(choices))


def write_demo_data(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` into `directory`, made where it is missing, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "eval.jsonl"
    for path, rows in zip(paths, demo_rows(seed), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qlora_trainer.cli.demo_data DIRECTORY")
    for written in write_demo_data(Path(sys.argv[1])):
        print(written)
