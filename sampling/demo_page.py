"""The page of mode=demo: gradio components round what live.py writes, and its server.

gradio is an optional package, so it is imported where it is used. The page asks nothing of any
other machine: gradio reports nothing, its fonts come with it, and the browser is told to load from
this address alone.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from samplers.writing import SAMPLERS
from sampling import live
from sampling.live import GAP, Control, Job, Text
from sampling.notebook import Writer
from settings.limits import Limit

SIDES = ("A", "B")
WAITING = 8  # presses of the button that may wait for the one at work
PAUSE = Control(
    "pause",
    "pause",
    0.05,
    "Seconds after each evaluation, to look at it. They are not counted.",
    limit=Limit("at least 0 and at most 1", lambda value: 0 <= value <= 1, 0.0),
)
# Scripts and styles of gradio stand in its page; whatever else would be loaded comes from here.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; form-action 'none'; base-uri 'self'; object-src 'none';"
    " frame-ancestors 'none'"
)
STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 12rem; max-height: 36rem;
  overflow: auto; contain: paint; line-height: 1.7; font-family: Georgia, serif; }
.text span { unicode-bidi: isolate; }
.text span:hover { outline: 1px solid #888; }
.text .masked { color: #bbb; }
.text .fresh { background: #fd4; color: black; }
.text .given { color: #06c; }
.figures { color: #666; font-size: small; }
.problem { color: #b00; }
"""
FONTS = ("system-ui", "sans-serif")  # of the machine that looks
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
# the gap goes where the cursor is; the box keeps what is marked when it loses the focus
INSERT = """(text) => {
  const box = document.querySelector('#prompt textarea');
  const [from, to] = [box.selectionStart, box.selectionEnd];
  setTimeout(() => { box.focus(); box.setSelectionRange(from + GAP.length, from + GAP.length); });
  return text.slice(0, from) + GAP + text.slice(to);
}""".replace("GAP.length", str(len(GAP))).replace("GAP", repr(GAP))


@dataclass(frozen=True)
class Page:
    """What the page offers. `about`: the model in a line. `length`: of the text, for both sides;
    `controls`: of each side; `second`: {field: value} where the second side begins otherwise."""

    writer: Writer
    about: str
    prompt: str
    length: Control
    controls: Sequence[Control]
    second: dict = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)  # at work, by the session of a browser

    @property
    def can_infill(self) -> bool:
        return "infill" in SAMPLERS[self.writer.writes].can

    def write(self, session: str, prompt, length, pause, *values) -> Iterator[list[str]]:
        """The HTML of both sides, again and again until both texts have ended. values: of the
        controls of one side after the other."""
        size, piece = len(self.controls), live.piece_reader(self.writer.tokenizer)
        shown, texts = [""] * len(SIDES), {}
        for side in range(len(SIDES)):
            try:
                wanted = live.read([self.length], [length])
                wanted |= live.read(self.controls, values[side * size : (side + 1) * size])
                pause = PAUSE.read(pause)
                texts[side] = Text(self.writer, str(prompt or ""), wanted)
            except ValueError as problem:
                shown[side] = live.refused_html(str(problem))
        seen = dict.fromkeys(texts, (0, 0))  # evaluations before the last change, and with it
        self.jobs[session] = job = Job(list(texts.values()), pause)
        try:
            for _ in job.run():
                for side, text in texts.items():
                    if (nfe := text.progress.nfe) > seen[side][1]:
                        seen[side] = seen[side][1], nfe
                    fresh = None if text.ended else seen[side][0]
                    shown[side] = live.side_html(text, piece, fresh)
                yield list(shown)
        finally:
            self.jobs.pop(session, None)

    def stop(self, session: str) -> None:
        """What this browser had asked for."""
        if session in self.jobs:
            self.jobs[session].stop.set()


def component(control: Control, value, **more):
    """The gradio component of a setting."""
    import gradio as gr

    more |= {"label": control.key, "info": control.about, "interactive": True}
    if control.names:
        return gr.Dropdown(list(control.names), value=value, **more)
    return gr.Number(value, **more)


def side_components(page: Page, name: str, changed: dict) -> tuple[list, object]:
    """The controls of one side and the place of its text."""
    import gradio as gr

    start = {c.field: changed.get(c.field, c.default) for c in page.controls}
    made = {}
    with gr.Column(elem_id=f"side-{name}"):
        gr.Markdown(f"### {name}")
        output = gr.HTML(elem_id=f"text-{name}")
        with gr.Accordion(f"Settings of {name}", open=True), gr.Row():
            for c in page.controls:
                visible = c.rules is None or start.get("steps") in c.rules
                # a refused value is answered by the page's own sentence
                ident = f"{name}-{c.field}"
                made[c] = component(
                    c, start[c.field], visible=visible, elem_id=ident, min_width=200
                )
    rule = next((made[c] for c in made if c.field == "steps"), None)
    depends = {c: each for c, each in made.items() if c.rules is not None}

    def reveal(chosen):
        return [gr.update(visible=chosen in c.rules) for c in depends]

    if rule is not None and depends:
        rule.change(reveal, inputs=[rule], outputs=[*depends.values()], queue=False, **QUIET)
    return list(made.values()), output


def prompt_box(page: Page):
    import gradio as gr

    about = "The text begins with it."
    if page.can_infill:
        about = f"Each {GAP} is one token to fill; nothing is appended then."
    return gr.Textbox(
        page.prompt,
        label="prompt",
        info=about,
        lines=3,
        max_length=live.MOST_CHARACTERS,
        elem_id="prompt",
    )


def build_blocks(page: Page):
    """The gradio Blocks of the page."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    with gr.Blocks(title="Block diffusion", analytics_enabled=False) as blocks:
        gr.HTML(f"<h2>Block diffusion</h2><p>{live.plain(page.about)}</p>")
        prompt = prompt_box(page)
        with gr.Row():
            gap = gr.Button("gap", elem_id="gap", visible=page.can_infill)
            go = gr.Button("write", variant="primary", elem_id="write")
            stop = gr.Button("stop", variant="stop", elem_id="stop")
        with gr.Row():
            length = component(page.length, page.length.default, elem_id="length")
            pause = component(PAUSE, PAUSE.default, elem_id="pause")
        with gr.Row():
            changes = dict(zip(SIDES, [{}, page.second], strict=True))
            sides = [side_components(page, name, changed) for name, changed in changes.items()]

        def write(request: gr.Request, *values):
            yield from page.write(request.session_hash, *values)

        def end(request: gr.Request):
            page.stop(request.session_hash)

        values = [prompt, length, pause, *(each for made, _ in sides for each in made)]
        go.click(write, inputs=values, outputs=[out for _, out in sides], **QUIET)
        stop.click(end, queue=False, **QUIET)
        gap.click(None, inputs=[prompt], outputs=[prompt], js=INSERT, **QUIET)
    # one text after the other has the machine to itself
    return blocks.queue(default_concurrency_limit=1, max_size=WAITING)


def build_app(page: Page, hosts: Sequence[str]):
    """The application to serve. hosts: the names by which a browser may ask for it; a page of
    another name, which its owner lets point here, is refused."""
    blocks = build_blocks(page)
    import fastapi
    import gradio as gr
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def forbid_others(request, call_next):
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return gr.mount_gradio_app(
        app,
        blocks,
        path="",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=FONTS, font_mono="monospace"),
        css=STYLE,
    )


def serve(app, listening: socket.socket) -> None:
    """Answers browsers until the process is told to end."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ctrl-C and SIGTERM end the process as everywhere in this project."""

        def capture_signals(self):
            return nullcontext()

    Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
