"""The door in the browser: a Gradio page over the library.

`page` lays out and wires, `studio` answers, `html` and `pictures` write HTML, `messages` says what went wrong. What is not
presentation lives in the library: `catalog`, `estimate`, `workspace`, `lease`, `pairs`.
"""
