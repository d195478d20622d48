"""Words of the generated replies: forms of training users, forms of held-out users, and wordings.

No product stands in another one, and no wording holds a digit or a name. A look at a reply then tells its facts.
"""


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _forms(text: str) -> tuple[str, ...]:
    return tuple(" ".join(form.split()) for form in text.split("|"))


GREETINGS = {
    "train": _forms(
        """Hi|Hello|Dear|Hey|Good day|Greetings|Hi there|Hello there|Hey there|Good morning|Good afternoon|
        Welcome back|Many greetings|Warm greetings|Hello and welcome|Good to hear from you|
        Nice to hear from you|Hi again|Hello again|A very good day|Lovely to hear from you|Hi and thanks|
        Season's greetings|Hey again|Best greetings|Esteemed|Friendly greetings|Hello once more"""
    ),
    "held_out": _forms(
        """Ahoy|Howdy|Hiya|Salutations|Aloha|Yo|Hola|Bonjour|Moin|Servus|Namaste|Ciao|Oh wonderful|
        Top of the morning|G'day|Cheerio|Hallo|Well met|Merhaba|Evening"""
    ),
}
"""Beginnings of a greeting, by the users that may have them."""
GREETING_MARKS = (",", "!", " -", ".", ":", "!!")
SIGN_OFFS = {
    "train": _forms(
        """Best regards|Kind regards|Regards|Sincerely|See you|Thanks|Many thanks|Thank you|Cheers|
        All the best|Take care|Warm regards|Best wishes|Yours truly|With thanks|Have a nice day|
        Yours sincerely|With best wishes|Talk soon|Have a great week|Warmly|Respectfully|Gratefully yours|
        Until next time|Enjoy your day|Always happy to help|Have a lovely evening|Kindest regards"""
    ),
    "held_out": _forms(
        """Toodle-oo|Over and out|Stay sunny|Fair winds|Ta ta|Onwards|Peace|High five|Sunny greetings|
        Keep smiling|Hugs|Be well|Ever yours|Godspeed|So long|Adios|Stay golden|Bye for now|In haste|
        Much obliged"""
    ),
}  # fmt: skip
"""Endings of a reply, by the users that may have them."""
SIGN_OFF_MARKS = (",", "!", " -", ".", "", " ~")
EMOJI = {"train": tuple("🙂😊👍🎉🌟🙏💪🚀🌻✨😄🤝"), "held_out": tuple("🦊🍀🐝🌈🎈🐢🍋🌵🦉🍒🐳🔆")}
AGENTS = {
    "train": _forms(
        """Agnes|Albert|Alma|Anders|Anita|Astrid|Basil|Berta|Boris|Camille|Carlos|Celia|Conrad|Daria|
        Derek|Edith|Egon|Elena|Enzo|Erika|Esther|Fabian|Felix|Flora|Frieda|Gerd|Gilbert|Gloria|
        Gunther|Hedda|Helga|Henrik|Hubert|Ilse|Inga|Irma|Jakob|Janet|Joachim|Judith|Julius|Karin|
        Klaus|Lars|Laura|Leonie|Lothar|Louise|Ludwig|Magda|Marius|Martha|Mirko|Monica|Nils|Norbert|
        Olga|Otto|Pamela|Pascal"""
    ),
    "held_out": _forms(
        """Radu|Ragnar|Ramona|Raul|Regina|Renata|Roland|Rosalie|Rufus|Sabine|Selma|Sergio|Sibyl|Silvia|
        Sofia|Stella|Sven|Tabea|Tamara|Thelma|Theo|Tilda|Tobias|Ulrich|Valerie|Vincent|Waldo|Walter|
        Werner|Wilma|Winston|Wolfram|Yannick|Yvonne|Zelda|Zoltan|Svea|Rupert|Ronja|Rasmus|Sigrid|
        Torsten|Vilma|Ulla|Thekla|Roswitha|Reinhard|Salome"""
    ),
}
"""Names of those who answer."""
CUSTOMERS = _forms(
    """Ben|Wei|Fatima|Sam|Priya|Noor|Diego|Yuki|Amara|Chidi|Elif|Goran|Hanna|Ivo|Jamal|Keiko|Leila|
        Mateo|Nadia|Omar|Petra|Quentin|Samir|Tova|Uma|Viktor|Wanda|Xenia|Yusuf|Zoe|Arjun|Bianca|
        Cyrus|Dalia|Emeka|Farid|Greta|Hugo|Ines|Jonas|Kofi|Lucia|Malik|Nina|Oscar|Paulo|Rania|Stefan|
        Tomas|Ursula|Vera|Yara|Zain|Anouk|Bruno|Clara|Dmitri"""
)
"""Names of those who write."""
PRODUCTS = _forms(
    """desk lamp|tea kettle|yoga mat|bike helmet|rain jacket|hand blender|phone case|camping stove|
        wool blanket|garden hose|coffee grinder|alarm clock|travel backpack|board game|bread knife|
        car charger|electric drill|fitness watch|floor rug|frying pan|guitar strap|hair dryer|
        wireless headset|ice maker|inkjet printer|music keyboard|laptop stand|microscope|office chair|
        picture frame|pressure washer|road atlas|sewing machine|shower curtain|sleeping bag|soup ladle|
        space heater|suitcase|table fan|camera tripod|vacuum cleaner|wall shelf|water bottle|webcam"""
)

MATTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "late": (
        ("My {product} from order {number} has not arrived yet. Where is it?",
         "I am still waiting for the {product}, order {number}. When will it come?"),
        ("The {product} left our depot late and reaches you within two days.",
         "I traced order {number}: the {product} is with the carrier and comes tomorrow.",
         "Your {product} got stuck in sorting, and we have put it on the next van.",
         "A delay at the port held up the {product} of order {number}; it is moving again."),
    ),
    "broken": (
        ("The {product} of order {number} came broken. What can I do?",
         "I unpacked my {product} today and it is cracked. The order is {number}."),
        ("A new {product} goes out to you today, and you can keep the damaged one.",
         "We replace the {product} of order {number} free of charge.",
         "Please send one photo of the {product}, and we exchange it at once.",
         "That should not happen: a fresh {product} for order {number} is being packed."),
    ),
    "refund": (
        ("I sent back the {product} of order {number}. When do I get my money?",
         "Where is my refund for the {product}? The order was {number}."),
        ("Your money for the {product} is on its way to your bank.",
         "The refund of order {number} for the {product} was booked this morning.",
         "We have the returned {product} here and pay you back within a week.",
         "Accounting has released the sum for the {product}, order {number}."),
    ),
    "wrong": (
        ("You sent me the wrong colour of the {product}, order {number}.",
         "The {product} I received is not the one I ordered under {number}."),
        ("We mixed up two parcels, and the right {product} follows tomorrow.",
         "I have set aside the correct {product} for order {number}.",
         "Simply hand the wrong {product} to our driver, who brings the other one.",
         "The {product} in order {number} was mislabelled; the right one is coming."),
    ),
    "cancel": (
        ("Please cancel the {product} in order {number}.",
         "I no longer need the {product}. Can you stop order {number}?"),
        ("The {product} is cancelled, and nothing will be charged.",
         "I took the {product} out of order {number} in time.",
         "Done: we will not send the {product}.",
         "Order {number} is stopped, so the {product} stays with us."),
    ),
    "address": (
        ("I have moved. Can the {product} of order {number} go to my new home?",
         "Please change the address for my {product}, order {number}."),
        ("The {product} now goes to your new address.",
         "I changed the label of order {number}, and the {product} follows you.",
         "The driver of the {product} knows about your move.",
         "Your new street is noted for the {product}, order {number}."),
    ),
    "invoice": (
        ("I need an invoice for the {product} I bought under {number}.",
         "Could you send the bill for my {product}? It was order {number}."),
        ("The invoice for the {product} is attached.",
         "You find the bill of order {number} for the {product} in your account.",
         "I asked our office to mail you the invoice of the {product} today.",
         "Attached is a copy of invoice {number} for the {product}."),
    ),
    "warranty": (
        ("My {product} stopped working. Does the warranty of order {number} hold?",
         "Is the {product} from order {number} still under warranty?"),
        ("Yes, the {product} is covered for another year.",
         "Order {number} is within warranty, so we repair the {product} for free.",
         "The maker vouches for the {product}; bring it to any of our shops.",
         "Your {product} of order {number} can go to our workshop at no cost."),
    ),
    "stock": (
        ("When is the {product} available again? My waiting number is {number}.",
         "I have been on the list for the {product} as number {number}. Any news?"),
        ("A new batch of the {product} comes in next week.",
         "Number {number} is near the top, and the {product} is due soon.",
         "The {product} is sold out, but we expect more by the end of the month.",
         "I reserved a {product} for you under {number}."),
    ),
    "meeting": (
        ("Can we move our call about the {product} campaign, room {number}, to Friday?",
         "Would Friday suit you for the {product} review in room {number}?"),
        ("Friday works for me, and I bring the {product} figures.",
         "Room {number} is free then, so let us look at the {product} on Friday.",
         "I moved the talk on the {product} in everybody's calendar.",
         "Friday it is: the {product} stays on the agenda in room {number}."),
    ),
    "draft": (
        ("Did you read my draft on the {product}? It is document {number}.",
         "What do you think of the {product} text in document {number}?"),
        ("Your text on the {product} reads well; only the ending is too long.",
         "I went through document {number}, and the {product} part convinced me.",
         "The draft about the {product} needs one more picture.",
         "I left three remarks on the {product} in document {number}."),
    ),
    "price": (
        ("What would ten pieces of the {product} cost? Our quote is {number}.",
         "Could you lower the price of the {product} in quote {number}?"),
        ("For ten pieces of the {product} we can take off a tenth.",
         "Quote {number} now shows a better price for the {product}.",
         "The {product} is already at its lowest price, but we ship it for free.",
         "I asked my manager about quote {number}, and the {product} gets cheaper."),
    ),
}  # fmt: skip
"""Matter of a request -> wordings of the request, and wordings of an answer to it."""

TONES: dict[str, tuple[str, ...]] = {
    "formal": _lines(
        """We appreciate that you contacted us.
        Please accept our thanks for your message.
        We remain at your disposal for any further questions.
        Should anything be unclear, kindly reply to this message.
        Your request has been handled with priority.
        We value your patience in this matter.
        A written confirmation will be sent to you shortly.
        No further action is required on your part."""
    ),
    "warm": _lines(
        """Thanks so much for writing to us.
        It is always a pleasure to read your messages.
        Just drop me a line whenever something comes up.
        I am really glad that you asked.
        I will keep an eye on it for you.
        You can always count on us.
        Do let me know how it goes.
        I hope that makes your day a little easier."""
    ),
    "brisk": _lines(
        """Got it.
        Nothing else to do for you.
        Write back if not.
        That is all from my side.
        Checked it twice.
        Short answer, but a sure one.
        Will be done by tonight.
        Any trouble, call the desk.
        No need to write again.
        The rest sorts itself out.
        Same day service, as ever."""
    ),
    "sorry": _lines(
        """I am very sorry about the trouble.
        Please forgive us for the wait.
        That is not how we want to treat you.
        I understand how annoying this must be.
        We will do better next time.
        I apologise once more on behalf of everybody here.
        You had every reason to complain.
        I personally make sure that it does not happen again."""
    ),
}
"""Tone -> lines that fit any request."""
FRAMES = (
    "{question} Thank you, {customer}",
    "Hello, {customer} here. {question}",
    "{question}\n{customer}",
    "This is {customer}. {question} Please help.",
    "Dear team, {question} Best, {customer}",
)
"""Ways to ask a question; each names the customer."""
