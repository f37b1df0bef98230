"""The look: warm paper and indigo ink, and the same at night. Fonts of the system, so nothing is fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base
from gradio.themes.utils.colors import Color

# A server that was started again knows nothing of the pages left open: their job, the classes and pairs on offer. Where a
# stream broke, Gradio reloads the page when it is back; this does the same for a page that only stood there.
RETURN = """<script>
setInterval(async () => {
  if (document.hidden) return;
  const now = await fetch('gradio_api/app_id').then((answer) => answer.json()).catch(() => null);
  if (now && now.app_id !== window.gradio_config.app_id) location.reload();
}, 3000);
</script>"""
# Answers come in one stream, which the server closes when nothing is asked. What is asked in that very moment has its answer in
# no stream, until the page asks something else: so some seconds after whatever it asked last, it asks for nothing.
NUDGE = """<script>
{
  let timer, isOwn = false;
  new PerformanceObserver((list) => {
    for (const { name } of list.getEntries()) {
      if (!name.includes('/queue/join')) continue;
      if (isOwn) { isOwn = false; continue; }
      clearTimeout(timer);
      timer = setTimeout(() => { isOwn = true; document.querySelector('#nudge')?.click(); }, 4000);
    }
  }).observe({ type: 'resource' });
}
</script>"""
# Gradio confines a page's style sheet to the column inside these two, so their own margins are set in the head.
HEAD = (
    """<style>
.gradio-container .main.fillable { max-width: 1080px; padding: 8px 20px 48px; }
@media (max-width: 720px) {
  .gradio-container.gradio-container { padding: 0; } .gradio-container .main.fillable.app { padding: 4px 12px 40px; }
}
</style>"""
    + RETURN
    + NUDGE
)
STYLE = Path(__file__).with_name("style.css")
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "Consolas", "monospace"]

INDIGO = Color(
    name="indigo-ink", c50="#f1effd", c100="#e3dffb", c200="#c9c2f7", c300="#aba0f1", c400="#8a7be9", c500="#6654dc",
    c600="#4b3acb", c700="#3c2daa", c800="#30258a", c900="#271f6e", c950="#181346",
)  # fmt: skip
PAPER = Color(
    name="paper", c50="#fbf9f4", c100="#f5f2ea", c200="#e8e3d7", c300="#d3ccbc", c400="#a49c8c", c500="#6f685c",
    c600="#565046", c700="#3d3946", c800="#26222f", c900="#1a1723", c950="#121019",
)  # fmt: skip


def new_theme() -> Base:
    return Base(primary_hue=INDIGO, secondary_hue=INDIGO, neutral_hue=PAPER, font=FONT, font_mono=MONO, radius_size="lg").set(
        body_background_fill="#f8f5ee",
        body_background_fill_dark="#121019",
        body_text_color="#1f1a2e",
        body_text_color_dark="#f1eefa",
        body_text_color_subdued="#5e576b",
        body_text_color_subdued_dark="#b4adc6",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1b1825",
        background_fill_secondary="#f8f5ee",
        background_fill_secondary_dark="#16131f",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1b1825",
        block_border_width="0px",
        block_label_text_color="#4a4358",
        block_label_text_color_dark="#cdc6de",
        block_title_text_color="#4a4358",
        block_title_text_color_dark="#cdc6de",
        block_shadow="none",
        border_color_primary="#e2dccd",
        border_color_primary_dark="#332e42",
        input_background_fill="#fbf9f4",
        input_background_fill_dark="#14121c",
        input_border_width="1px",
        input_placeholder_color="#6f687c",
        input_placeholder_color_dark="#9a93ac",
        button_primary_background_fill="#4b3acb",
        button_primary_background_fill_hover="#3c2daa",
        button_primary_background_fill_dark="#aba0f1",
        button_primary_background_fill_hover_dark="#c9c2f7",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#181346",
        button_secondary_background_fill="#efebfd",
        button_secondary_background_fill_hover="#e3dffb",
        button_secondary_background_fill_dark="#2b2640",
        button_secondary_background_fill_hover_dark="#3a3355",
        button_secondary_text_color="#30258a",
        button_secondary_text_color_dark="#dcd6fb",
        checkbox_label_background_fill_selected="#4b3acb",
        checkbox_label_background_fill_selected_dark="#aba0f1",
        checkbox_label_text_color_selected="#ffffff",
        checkbox_label_text_color_selected_dark="#181346",
    )
