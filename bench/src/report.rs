//! What a run says: a document for machines, a summary for the terminal.
//!
//! A scenario measures, fills in [`Findings`], and [`Run::new`] judges them: a run that broke a
//! promise keeps no speed.

mod document;
mod facts;
mod measure;
mod schema;
mod terminal;

#[cfg(test)]
pub(crate) use document::Speed;
pub(crate) use document::{
    Arrivals, Begun, Document, Figure, Findings, Generator, Goal, Live, Machine, Percentiles,
    Phase, Process, Ratio, Run, Sample, Suite, Term, Verdict, Versions,
};
pub(crate) use facts::command;
pub(crate) use measure::{Offered, ms};
pub(crate) use schema::schema;
