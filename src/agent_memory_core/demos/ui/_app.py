"""The program that Streamlit runs: ``agent-memory ui``."""

import streamlit as st

from agent_memory_core.demos.ui import dilemma, experts, inspector, models, talk


def _dilemma() -> None:
    dilemma.show(st)


def _experts() -> None:
    experts.show(st)


def _talk() -> None:
    talk.show(st)


def _models() -> None:
    models.show(st)


def _inspector() -> None:
    inspector.show(st)


st.set_page_config(page_title="agent-memory", layout="wide")
st.navigation(
    [
        st.Page(
            _dilemma, title="Prisoner's dilemma", icon=":material/gavel:", url_path="dilemma", default=True
        ),
        st.Page(_experts, title="Experts that remember", icon=":material/menu_book:", url_path="experts"),
        st.Page(_talk, title="A session of your own", icon=":material/forum:", url_path="talk"),
        st.Page(_models, title="Models", icon=":material/memory:", url_path="models"),
        st.Page(_inspector, title="What is stored", icon=":material/database:", url_path="stored"),
    ]
).run()
