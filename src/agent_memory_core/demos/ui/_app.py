"""The program that Streamlit runs: ``agent-memory ui``."""

import streamlit as st

from agent_memory_core.demos.ui import dilemma, experts, inspector, talk


def _dilemma() -> None:
    dilemma.show(st)


def _experts() -> None:
    experts.show(st)


def _talk() -> None:
    talk.show(st)


def _inspector() -> None:
    inspector.show(st)


st.navigation(
    [
        st.Page(_dilemma, title="Prisoner's dilemma", url_path="dilemma", default=True),
        st.Page(_experts, title="Experts that remember", url_path="experts"),
        st.Page(_talk, title="A session of your own", url_path="talk"),
        st.Page(_inspector, title="What is stored", url_path="stored"),
    ]
).run()
