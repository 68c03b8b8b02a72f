//! What a run says: a document for machines, a page and a summary for people, plots for documents,
//! and what two builds say together.
//!
//! A scenario measures, fills in [`Findings`], and [`Run::new`] judges them: a run that broke a
//! promise keeps no speed.

mod charts;
mod command;
mod compare;
mod document;
mod facts;
mod html;
pub(crate) mod live;
mod measure;
mod plot;
#[cfg(test)]
mod sample;
mod schema;
mod terminal;
mod text;
mod threshold;

pub(crate) use command::{CompareArgs, End, Output, PlotArgs, ReportArgs};
#[cfg(test)]
pub(crate) use document::Speed;
pub(crate) use document::{
    Arrivals, Begun, Document, Figure, Findings, Generator, Goal, Live, Machine, Percentiles,
    Phase, Process, Ratio, Run, Sample, Suite, Term, Verdict, Versions,
};
pub(crate) use facts::{command, memory_bytes};
pub(crate) use measure::{Offered, ms};
pub(crate) use schema::schema;
