//! Bounds that a run must keep, as they stand on a command line: `p99_ms <= 500`.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use anyhow::{Result, bail};

use super::document::{Document, Figure, Goal, Op, Run};
use super::text::number;

/// A bound on one figure.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Threshold {
    figure: String,
    goal: Goal,
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no bound; write a figure, <=, <, >= or >, and a number: p99_ms <= 500"
            )
        };
        let at = text.find(['<', '>']).ok_or_else(wrong)?;
        let (figure, rest) = (text[..at].trim(), &text[at..]);
        let (op, value) = [Op::AtMost, Op::AtLeast, Op::Below, Op::Above]
            .into_iter()
            .find_map(|op| Some((op, rest.strip_prefix(op.sign())?)))
            .ok_or_else(wrong)?;
        let value: f64 = value.trim().parse().map_err(|_| wrong())?;
        if figure.is_empty() || !value.is_finite() {
            return Err(wrong());
        }
        Ok(Self {
            figure: figure.to_owned(),
            goal: Goal { op, value },
        })
    }
}

impl Display for Threshold {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {}",
            self.figure,
            self.goal.op.sign(),
            self.goal.value
        )
    }
}

/// A bound that was not kept, in words.
pub(crate) type Miss = String;

/// What must be, and what must not be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bounds<'a> {
    pub(crate) require: &'a [Threshold],
    pub(crate) fail_if: &'a [Threshold],
}

impl Bounds<'_> {
    /// The bounds that a document does not keep. In a suite every run that has the figure counts.
    ///
    /// # Errors
    ///
    /// No run has a figure of this name.
    pub(crate) fn missed(&self, document: &Document) -> Result<Vec<Miss>> {
        let runs: &[Run] = match document {
            Document::Run(run) => std::slice::from_ref(&**run),
            Document::Suite(suite) => &suite.runs,
        };
        let wanted = self.require.iter().map(|bound| (bound, true));
        let banned = self.fail_if.iter().map(|bound| (bound, false));
        let mut missed = Vec::new();
        for (bound, wanted) in wanted.chain(banned) {
            for figure in figures(runs, &bound.figure)? {
                if bound.goal.is_met(figure.value) != wanted {
                    let what = if wanted { "required" } else { "not allowed" };
                    missed.push(format!(
                        "{} is {} {}, {what}: {bound}",
                        figure.name,
                        number(figure.value),
                        figure.unit
                    ));
                }
            }
        }
        Ok(missed)
    }
}

/// The figures of a name, or an error that says which one was probably meant.
fn figures<'a>(runs: &'a [Run], name: &str) -> Result<Vec<&'a Figure>> {
    let all = || runs.iter().flat_map(|run| &run.figures);
    let found: Vec<&Figure> = all().filter(|figure| figure.name == name).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let nearest = all().min_by_key(|figure| distance(&figure.name, name));
    match nearest {
        Some(nearest) => bail!(
            "there is no figure {name:?}; did you mean {:?}?",
            nearest.name
        ),
        None => bail!("there is no figure {name:?}: the run has no figures at all"),
    }
}

/// How many characters must be added, taken away or changed to make one word of another.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (n, char) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = n + 1;
        for (m, same) in other.iter().map(|other| *other == char).enumerate() {
            let changed = diagonal + usize::from(!same);
            diagonal = row[m + 1];
            row[m + 1] = changed.min(row[m] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::sample;

    fn bound(text: &str) -> Threshold {
        text.parse().unwrap()
    }

    #[test]
    fn bounds_are_read_with_and_without_spaces() {
        let wanted = Threshold {
            figure: "p99_ms".to_owned(),
            goal: Goal::at_most(500.0),
        };
        for text in ["p99_ms <= 500", "p99_ms<=500", " p99_ms  <=  5e2 "] {
            assert_eq!(bound(text), wanted, "{text}");
        }
        assert_eq!(bound("80 %/p99_ms < 1").figure, "80 %/p99_ms");
    }

    #[test]
    fn what_is_no_bound_is_refused_with_an_example() {
        for text in [
            "",
            "p99_ms",
            "p99_ms = 5",
            "<= 5",
            "p99_ms <=",
            "p99_ms <= fast",
            "a < NaN",
            "a <> 1",
        ] {
            let error = text.parse::<Threshold>().unwrap_err();
            assert!(error.contains("p99_ms <= 500"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_bound_is_read_as_it_is_written(
            figure in "[a-z0-9_/%.÷]{1,12}",
            op in prop::sample::select(vec![Op::AtLeast, Op::AtMost, Op::Above, Op::Below]),
            value in prop::num::f64::NORMAL | prop::num::f64::ZERO,
        ) {
            let goal = Goal { op, value };
            let threshold = Threshold { figure, goal };
            prop_assert_eq!(threshold.to_string().parse::<Threshold>(), Ok(threshold));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,24}") {
            if let Ok(threshold) = text.parse::<Threshold>() {
                prop_assert_eq!(threshold.to_string().parse::<Threshold>(), Ok(threshold));
            }
        }

        #[test]
        fn distance_is_one_of_words(one in "[ab]{0,6}", other in "[ab]{0,6}") {
            prop_assert_eq!(distance(&one, &other), distance(&other, &one));
            prop_assert_eq!(distance(&one, &other) == 0, one == other);
            prop_assert!(distance(&one, &other) <= one.len().max(other.len()));
        }
    }

    #[test]
    fn bounds_are_compared_with_the_figures() {
        let document = Document::Run(Box::new(sample::run(7)));
        let missed = |require: &str, fail_if: &str| {
            let bounds = Bounds {
                require: &[bound(require)],
                fail_if: &[bound(fail_if)],
            };
            bounds.missed(&document)
        };
        assert_eq!(missed("p99_ms <= 1e9", "p99_ms > 1e9").unwrap(), [""; 0]);
        let both = missed("p99_ms > 1e9", "p99_ms <= 1e9").unwrap();
        assert_eq!(both.len(), 2, "{both:?}");
        assert!(
            both[0].contains("required: p99_ms > 1000000000"),
            "{both:?}"
        );
        let error = missed("p99ms <= 5", "p99_ms > 1e9")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "there is no figure \"p99ms\"; did you mean \"p99_ms\"?"
        );
    }
}
