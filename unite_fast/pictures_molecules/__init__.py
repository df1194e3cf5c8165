"""Pictures of molecules: drawn sheets, histograms against the data, a page of 3-D views that needs no network."""

from unite_fast.pictures_molecules.histograms import histograms
from unite_fast.pictures_molecules.page import Card, Section, generated_section, molecule_page, reconstruction_section
from unite_fast.pictures_molecules.sheets import molecule_sheet, reconstruction_sheet

__all__ = [
    "Card",
    "Section",
    "generated_section",
    "histograms",
    "molecule_page",
    "molecule_sheet",
    "reconstruction_section",
    "reconstruction_sheet",
]
