-- The words that products are made of, one row per department.
--
-- pick() and chance() depend on (seed, product, slot) alone, so the same seed gives the same
-- catalogue on every version of PostgreSQL, in any order of evaluation.

CREATE OR REPLACE FUNCTION pg_temp.chance(seed bigint, product bigint, slot integer, n bigint)
RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT (hashint8extended(product * 64 + slot, seed) & 9223372036854775807) % n $$;

CREATE OR REPLACE FUNCTION pg_temp.pick(words text[], seed bigint, product bigint, slot integer)
RETURNS text LANGUAGE sql IMMUTABLE AS
$$ SELECT words[1 + pg_temp.chance(seed, product, slot, cardinality(words))] $$;

CREATE TEMPORARY TABLE department (
    number     integer PRIMARY KEY,
    name       text,
    nouns      text[],
    adjectives text[],
    materials  text[],
    uses       text[],
    features   text[]
) ON COMMIT DROP;

INSERT INTO department VALUES
(0, 'Audio',
 '{headphones,speaker,soundbar,turntable,microphone,"radio alarm",amplifier,earbuds,"cassette deck",subwoofer}',
 '{wireless,portable,"noise-cancelling",studio,retro,waterproof,compact,"high-resolution",foldable,stereo}',
 '{"brushed aluminium","vegan leather",walnut,"recycled plastic",mesh,"memory foam"}',
 '{"long train rides","a quiet office","parties in the garden","late-night listening","podcasts in the kitchen","home recording"}',
 '{"a battery that lasts forty hours","automatic pairing","a cable for the aeroplane","touch controls","adjustable bass","a dial you can find in the dark"}'),
(1, 'Kitchen',
 '{"coffee grinder","cast-iron pan","bread knife",kettle,"mixing bowl",toaster,"salad spinner","pepper mill",casserole,"chopping board"}',
 '{"non-stick",stackable,"dishwasher-safe",heavy,"hand-forged",electric,"heat-resistant",enamelled,slim,"space-saving"}',
 '{"stainless steel",bamboo,stoneware,"borosilicate glass",copper,"olive wood",silicone}',
 '{"slow Sunday breakfasts","feeding a crowd","small flats","baking with children","a weeknight supper","preserving fruit"}',
 '{"a handle that stays cool","twelve grinding steps","a lid that doubles as a plate","rubber feet","a spout that does not drip","measuring lines inside"}'),
(2, 'Garden',
 '{"watering can","pruning shears","hand trowel","bird feeder","garden hose",wheelbarrow,"plant pot","rain gauge",lantern,"compost bin"}',
 '{"frost-proof","rust-free",lightweight,telescopic,"self-watering",sturdy,"hand-made",weatherproof,galvanised,"solar-powered"}',
 '{terracotta,"powder-coated steel",cedar,"natural rubber",zinc,"woven willow"}',
 '{"balconies and terraces","raised beds","dry summers","a first vegetable patch","cutting roses","wintering outdoors"}',
 '{"a brass nozzle","drainage holes","a grip for small hands","a hook for hanging","replaceable blades","a five-year guarantee against rust"}'),
(3, 'Office',
 '{keyboard,mouse,"desk lamp",monitor,"filing tray","fountain pen",notebook,"standing desk",webcam,"paper shredder"}',
 '{wireless,ergonomic,adjustable,silent,backlit,rechargeable,modular,dimmable,"height-adjustable","clip-on"}',
 '{"anodised aluminium",beech,felt,cork,"tempered glass","recycled paper"}',
 '{"long days at a screen","a tidy desk","video calls","left-handed people","working from home","taking notes in meetings"}',
 '{"quiet switches","a cable channel","three brightness levels","a rest for the wrist","a drawer for clips","a shutter for privacy"}'),
(4, 'Sport',
 '{"running shoes","yoga mat",rucksack,"bicycle pump","water bottle","climbing rope","swimming goggles",tent,"sleeping bag",helmet}',
 '{breathable,reflective,ultralight,insulated,"quick-drying","tear-resistant",padded,"anti-slip",packable,ventilated}',
 '{"ripstop nylon","merino wool","natural cork",neoprene,"carbon fibre","recycled polyester"}',
 '{"a wet weekend in the hills","early morning training","cycling to work","a first marathon","long-distance walking","open water"}',
 '{"a pocket for keys","sealed seams","a whistle on the strap","an anatomical fit","loops for poles","a lining that can be washed"}'),
(5, 'Photography',
 '{camera,tripod,"lens cap","camera strap","light meter","ring light","photo album",projector,"lens cloth",gimbal}',
 '{mirrorless,instant,"wide-angle",manual,stabilised,"shock-proof","full-frame",collapsible,wireless,panoramic}',
 '{magnesium,leather,"carbon fibre","multi-coated glass",canvas,"brushed steel"}',
 '{"portraits by the window","the northern lights","street scenes","macro work","weddings","a year abroad"}',
 '{"a bubble level","interchangeable feet","a viewfinder with dioptre","two card slots","a quick-release plate","a timer of ten seconds"}'),
(6, 'Toys',
 '{"building blocks","wooden train","jigsaw puzzle",kite,"board game","plush bear","marble run","paint set","toy theatre","spinning top"}',
 '{colourful,wooden,magnetic,"hand-painted",cooperative,educational,musical,soft,"glow-in-the-dark",giant}',
 '{"beech wood","organic cotton",cardboard,"water-based paint",felt,"soft rubber"}',
 '{"rainy afternoons","two to six players","curious toddlers","a long car journey","grandparents","birthday parties"}',
 '{"rounded edges","a bag to keep it in","a booklet in four languages","pieces that never get lost","a hidden compartment","stickers for the box"}'),
(7, 'Clothing',
 '{"rain jacket","wool scarf","denim shirt",mittens,"linen dress","knitted jumper",trousers,"felt hat","ankle boots","leather belt"}',
 '{windproof,lined,"slim-fit",oversized,"water-repellent","pre-washed",striped,reversible,"crease-free",seamless}',
 '{"organic cotton",linen,"merino wool","soft fleece","waxed canvas",corduroy}',
 '{"windy harbour days","layering in autumn","a summer wedding","commuting by bicycle","chilly offices","travelling light"}',
 '{"deep pockets","a hidden zip","buttons made of horn","cuffs that can be turned up","a loop for hanging","reinforced elbows"}');

CREATE TEMPORARY TABLE sentence (openings text[], middles text[], closings text[]) ON COMMIT DROP;

-- %1$s noun, %2$s adjective, %3$s material, %4$s use, %5$s feature
INSERT INTO sentence VALUES (
 ARRAY[
  'This %2$s %1$s was made for %4$s.',
  'A %2$s %1$s with %5$s, at home wherever there is %4$s in sight.',
  'Our customers asked for a %2$s %1$s, and here it is.',
  'Few things make %4$s as pleasant as a %2$s %1$s.',
  'Everything you expect of a good %1$s, and %5$s besides.',
  'Designed in a small workshop, this %1$s is as %2$s as it looks.'],
 ARRAY[
  'The body is made of %3$s and ages gracefully.',
  'It comes with %5$s, which you will soon take for granted.',
  'Thanks to %3$s it weighs less than you would think.',
  'We have tested it for %4$s over a whole year.',
  'You will notice %5$s the first time you use it.',
  'The %3$s is sourced in Europe and certified by an independent body.',
  'Where others save on details, this one has %5$s.',
  'It is %2$s by design, not by accident.',
  'Because it is %2$s, it has become the favourite for %4$s.',
  'Its parts can be ordered separately and replaced without tools.'],
 ARRAY[
  'Delivered in a plain cardboard box, without any plastic.',
  'Two years of guarantee; returns are free within thirty days.',
  'Wipe with a damp cloth and keep away from direct heat.',
  'Available in several colours while stocks last.',
  'A spare set of small parts is in the box.',
  'Winner of our readers'' choice, three years in a row.']);
