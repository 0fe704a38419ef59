"""A random walk over the page's actions in two tabs. pytest -m browser.

After each step the tab that acted must show what a model of the conversations says, and after the
walk the stored conversations must be those of the model.
"""

import random
from typing import Any

import pytest

from tests.server.browsing import at, pages, reload, send, shows, stored, words
from tests.server.fake_chat import FakeChat

pytestmark = pytest.mark.browser
_STEPS = 500


@pytest.fixture(scope="module")
def server(server: FakeChat) -> FakeChat:
    """The server, with slow replies."""
    server.delay = 0.01
    return server


class _Said:
    """A message of the user's, and how often a reply to it was begun."""

    def __init__(self, above: "_Said | None", words: str) -> None:
        self.above = above
        self.words = words
        self.tries = 1
        self.below: list[_Said] = []
        if above:
            above.below.append(self)

    def path(self) -> list[str]:
        """Return the words from the first message to this one."""
        return [*(self.above.path() if self.above else []), self.words]


class _Walk:
    """The tabs, and what they should show."""

    def __init__(self, tabs: list[Any], chat: FakeChat, seed: int) -> None:
        self.tabs, self.chat = tabs, chat
        self.random = random.Random(seed)
        self.leaves: dict[str, _Said] = {}  # the last message that is shown, by conversation
        self.all: dict[str, list[_Said]] = {}
        self.open: list[str | None] = [None] * len(tabs)  # the conversation of each tab
        self.running: dict[str, int] = {}  # the tab that may be writing a reply
        self.count = 0
        self.done: list[str] = []

    def step(self) -> None:
        """Do something somewhere."""
        tab = self.random.randrange(len(self.tabs))
        actions = [self.say] * 4 + [self.edit, self.retry, self.stop, self.go_on] * 2
        actions += [self.switch] * 3 + [self.new, self.reload, self.wait]
        action = self.random.choice(actions)
        self.done.append(f"{action.__name__} in {tab}: {self.open[tab]!r}")
        self.check(tab)  # it may have to see what the other tab did
        action(tab)
        self.check(tab)

    def check(self, tab: int) -> None:
        """Compare what a tab shows with the model."""
        name = self.open[tab]
        expected = self.leaves[name].path() if name else []
        try:
            shows(self.tabs[tab], *expected)
        except Exception as error:
            raise AssertionError(
                f"{words(self.tabs[tab])}, not {expected}, after {self.done[-16:]}"
            ) from error

    def new_words(self) -> str:
        """Return words that are said once."""
        self.count += 1
        return f"message {self.count}" + " and so on" * self.random.randrange(8)

    def free(self, name: str | None, tab: int) -> bool:
        """Return whether no other tab writes in a conversation."""
        return name is None or self.running.get(name, tab) == tab

    def say(self, tab: int) -> None:
        """Say something, once no reply runs."""
        page, name = self.tabs[tab], self.open[tab]
        if not self.free(name, tab):
            return
        at(page, "send").wait_for()
        text = self.new_words()
        said = _Said(self.leaves[name] if name else None, text)
        send(page, text)
        name = name or text[:60].strip()
        self.open[tab] = name
        self.leaves[name] = said
        self.all.setdefault(name, []).append(said)
        self.running[name] = tab

    def edit(self, tab: int) -> None:
        """Say something else in place of a message, whatever runs."""
        page, name = self.tabs[tab], self.open[tab]
        if not name or not self.free(name, tab):
            return
        path, place = self.leaves[name], self.random.randrange(len(self.leaves[name].path()))
        while len(path.path()) > place + 1:
            assert path.above
            path = path.above
        at(page, "edit").nth(place).click()
        text = self.new_words()
        field = page.locator(".message.user textarea")
        field.fill(text)
        field.press("Enter")
        self.leaves[name] = said = _Said(path.above, text)
        self.all[name].append(said)
        self.running[name] = tab

    def retry(self, tab: int) -> None:
        """Ask for another reply to the last message, if it has one, whatever runs."""
        page, name = self.tabs[tab], self.open[tab]
        if not name or not self.free(name, tab):
            return
        at(page, "send").wait_for()
        again = at(page, "retry").or_(at(page, "reply"))
        if again.count() and self.answers_last(page):
            again.last.click()
            self.leaves[name].tries += 1
            self.running[name] = tab

    def answers_last(self, page: Any) -> bool:
        """Return whether the last button that asks for a reply belongs to the last message."""
        script = "document.querySelector('#messages').lastElementChild.querySelector"
        return bool(page.evaluate(f"!!{script}('[data-testid=retry], [data-testid=reply]')"))

    def stop(self, tab: int) -> None:
        """Stop the reply that runs here."""
        self.tabs[tab].keyboard.press("Escape")

    def go_on(self, tab: int) -> None:
        """Go on with a reply that was cut off."""
        name = self.open[tab]
        more = at(self.tabs[tab], "go-on")
        if name and self.free(name, tab) and at(self.tabs[tab], "send").is_visible():
            if more.count() and self.answers_last(self.tabs[tab]):
                more.last.click()
                self.running[name] = tab

    def switch(self, tab: int) -> None:
        """Open a conversation."""
        if not self.leaves:
            return
        name = self.random.choice(sorted(self.leaves))
        entries = at(self.tabs[tab], "conversation")
        entries.get_by_text(name, exact=True).or_(
            entries.and_(self.tabs[tab].get_by_title(name, exact=True))
        ).first.click()
        self.open[tab] = name

    def new(self, tab: int) -> None:
        """Begin a conversation; there are at most four."""
        if len(self.leaves) < 4:
            at(self.tabs[tab], "new").click()
            self.open[tab] = None

    def reload(self, tab: int) -> None:
        """Load the page anew: replies that run in the tab are cut off."""
        page = self.tabs[tab]
        reload(page)
        at(page, "model").filter(has_text="demo").wait_for()
        at(page, "conversation").or_(page.locator(".empty")).first.wait_for()
        self.running = {name: owner for name, owner in self.running.items() if owner != tab}
        if self.leaves:
            at(page, "conversation").first.wait_for()
            self.switch(tab)

    def wait(self, tab: int) -> None:
        """Let replies end."""
        for page in self.tabs:
            page.wait_for_function("() => document.querySelector('#stop').hidden")
        self.tabs[tab].wait_for_timeout(300)
        for name, owner in list(self.running.items()):
            if self.open[owner] == name:
                del self.running[name]

    def compare(self) -> None:
        """Compare what is stored with the model."""
        self.tabs[0].wait_for_timeout(4000)
        kept = {one["name"]: one for one in stored(self.tabs[0])}
        assert sorted(kept) == sorted(self.leaves)
        for name, one in kept.items():
            self.compare_one(one, self.all[name], self.leaves[name])

    def compare_one(self, one: dict[str, Any], said: list[_Said], leaf: _Said) -> None:
        """Compare a stored conversation with the model."""
        nodes = one["nodes"]

        def asked(node: dict[str, Any] | None) -> dict[str, Any] | None:
            """Return the message of the user's that a message is, or replies to."""
            return nodes[node["parent"]] if node and node["role"] == "assistant" else node

        def path(node: dict[str, Any] | None) -> list[str]:
            node = asked(node)
            return [*path(nodes.get(node["parent"])), node["content"]] if node else []

        users = [node for node in nodes.values() if node["role"] == "user"]
        assert sorted(map(path, users)) == sorted(each.path() for each in said)
        tries = {each.words: each.tries for each in said}
        for reply in (node for node in nodes.values() if node["role"] == "assistant"):
            text = nodes[reply["parent"]]["content"]
            tries[text] -= 1
            assert tries[text] >= 0 and reply["content"]
            whole = self.chat.reply(text)
            ended = "state" not in reply
            assert reply["content"] == whole if ended else whole.startswith(reply["content"])
        assert path(nodes[one["leaf"]]) == leaf.path()


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_ends_where_its_model_does(browser: Any, server: FakeChat, seed: int) -> None:
    with pages(browser, server.url, 2) as tabs:
        walk = _Walk(tabs, server, seed)
        for _ in range(_STEPS):
            walk.step()
        walk.compare()
