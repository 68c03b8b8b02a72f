//! What a run says on the terminal when it is over: the verdict first.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

use super::document::{
    Arrivals, Document, Figure, Outcomes, Percentiles, Phase, Run, Speed, Suite, Term, Verdict,
};
use super::text::{grouped, number};
use crate::scenarios::outage::Effect;
use crate::verdict::Status;

/// A JSON value as a person reads it: text without its quotes.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

impl Display for Document {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(run) => run.fmt(f),
            Self::Suite(suite) => suite.fmt(f),
        }
    }
}

impl Display for Suite {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.verdict {
            Verdict::Pass => writeln!(f, "\n  PASS: every promise was kept in every run.\n")?,
            Verdict::Fail => {
                writeln!(
                    f,
                    "\n  FAIL: a promise was broken, or could not be checked."
                )?;
                for run in &self.runs {
                    if let Some(violation) = &run.first_violation {
                        writeln!(f, "        {}: {violation}", run.scenario)?;
                    }
                }
                writeln!(f)?;
            }
        }
        writeln!(
            f,
            "    {:<54}{:>12}{:>12}{:>10}{:>12}",
            "goal", "measured", "against", "ratio", "wanted"
        )?;
        let term = |term: &Term| term.value.map_or("–".to_owned(), number);
        for ratio in &self.goals {
            let mark = match ratio.met {
                Some(true) => "✓",
                Some(false) => "✗",
                None => "–",
            };
            writeln!(
                f,
                "  {mark} {:<54}{:>12}{:>12}{:>10}{:>12}",
                ratio.what,
                term(&ratio.measured),
                ratio.reference.as_ref().map_or(String::new(), term),
                ratio.value.map_or("–".to_owned(), number),
                format!("{} {}", ratio.goal.op.sign(), number(ratio.goal.value)),
            )?;
        }
        Ok(())
    }
}

impl Display for Run {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (&self.first_violation, self.verdict) {
            (None, Verdict::Pass) => writeln!(f, "  PASS: every promise was kept.\n")?,
            (violation, _) => {
                writeln!(f, "  FAIL: a promise was broken, or could not be checked.")?;
                if let Some(violation) = violation {
                    writeln!(f, "        {violation}")?;
                }
                writeln!(f, "        To repeat it: --seed {}\n", self.seed)?;
            }
        }
        match self.phases.as_slice() {
            [] => {}
            [phase] => phase.fmt(f)?,
            phases => steps(phases, f)?,
        }
        self.quoted(f)?;
        if let Some(outage) = &self.outage {
            outage.fmt(f)?;
        }
        if let Some(live) = &self.live {
            let show = |units: Option<u64>| units.map_or("?".to_owned(), grouped);
            writeln!(
                f,
                "  {:<26}{} → {} in {} frames\n",
                "live stock",
                show(live.first_remaining),
                show(live.last_remaining),
                grouped(live.frames),
            )?;
        }
        self.promises(f)
    }
}

impl Run {
    /// The figures that the scenario is about.
    fn quoted(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let own = self.figures.iter().filter(|figure| self.is_quoted(figure));
        let mut figures = own.peekable();
        if figures.peek().is_none() {
            return Ok(());
        }
        writeln!(f, "    {:<34}{:>14}{:>16}", "figure", "measured", "goal")?;
        for figure in figures {
            let mark = match figure.met {
                Some(true) => "✓",
                Some(false) => "✗",
                None => " ",
            };
            let wanted = figure.goal.map_or(String::new(), |goal| {
                format!("{} {}", goal.op.sign(), number(goal.value))
            });
            let measured = show_figure(figure);
            writeln!(f, "  {mark} {:<34}{measured:>14}{wanted:>16}", figure.name)?;
        }
        writeln!(f)
    }

    /// Whether a figure is one of the scenario's own: those that every phase has are shown with it.
    fn is_quoted(&self, figure: &Figure) -> bool {
        let of_its_phase = match &*self.phases {
            [phase] => phase.figures().iter().any(|one| one.name == figure.name),
            _ => !figure.is_of_the_run(),
        };
        figure.goal.is_some() || !of_its_phase
    }

    /// The checks, and the server's own audit.
    fn promises(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.checks.is_empty() {
            return Ok(());
        }
        writeln!(f, "    {:<30}{:<22}actual", "check", "expected")?;
        for check in &self.checks {
            let mark = match check.status {
                Status::Pass => "✓",
                Status::Fail => "✗",
                Status::Skipped => "–",
            };
            writeln!(
                f,
                "  {mark} {:<30}{:<22}{}",
                check.name, check.expected, check.actual
            )?;
            for line in &check.counter_example {
                writeln!(f, "      {line}")?;
            }
        }
        for check in self.audit.iter().flat_map(|audit| &audit.checks) {
            let mark = if check.status == "pass" { "✓" } else { "✗" };
            let (expected, actual) = (plain(&check.expected), plain(&check.actual));
            if expected == actual {
                writeln!(f, "    {mark} {:<28}{actual}", check.name)?;
            } else {
                writeln!(f, "    {mark} {:<28}{expected} → {actual}", check.name)?;
            }
        }
        Ok(())
    }
}

/// One line for each of several phases.
fn steps(phases: &[Phase], f: &mut Formatter<'_>) -> fmt::Result {
    let name = |phase: &Phase| phase.name.chars().count();
    let width = phases.iter().map(name).max().unwrap_or(0).max(5);
    writeln!(
        f,
        "  {:<width$}{:>11}{:>11}{:>9}{:>9}{:>9}{:>9}{:>9}",
        "phase", "purchases", "accepted/s", "p50 ms", "p99", "p99.9", "max", "harness"
    )?;
    for phase in phases {
        let (outcomes, generator) = (&phase.outcomes, &phase.generator);
        let speed = phase.speed.as_ref();
        let [rate, p50, p99, p99_9, max] = match speed {
            Some(speed) => {
                let all = &speed.latency_ms.all;
                [
                    speed.accepted_per_s.round(),
                    all.p50,
                    all.p99,
                    all.p99_9,
                    all.max,
                ]
                .map(number)
            }
            None => [const { String::new() }; 5],
        };
        let busy = format!("{:.0} %", generator.cpu_share * 100.0);
        writeln!(
            f,
            "  {:<width$}{:>11}{rate:>11}{p50:>9}{p99:>9}{p99_9:>9}{max:>9}{busy:>9}",
            phase.name,
            grouped(outcomes.purchases),
        )?;
        if generator.bottleneck {
            writeln!(f, "    The harness itself was probably the bottleneck.")?;
        }
    }
    writeln!(f)
}

/// A figure with its unit.
fn show_figure(figure: &Figure) -> String {
    format!("{} {}", number(figure.value), figure.unit)
        .trim_end()
        .to_owned()
}

impl Display for Phase {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let arrivals = match self.arrivals {
            Arrivals::Rate { per_s } => format!("at {}/s", number(per_s)),
            Arrivals::Burst => "all at once".to_owned(),
        };
        writeln!(
            f,
            "  {}: {} purchases {arrivals}, over {} connections\n",
            self.name,
            grouped(self.outcomes.purchases),
            grouped(self.connections),
        )?;
        if self.connections < self.connections_wanted {
            writeln!(
                f,
                "  Only {} of {} connections: the limit of open files, or the server, \
                 allowed no more.\n",
                self.connections, self.connections_wanted
            )?;
        }
        self.outcomes.fmt(f)?;
        if let Some(speed) = &self.speed {
            speed.fmt(f)?;
        }
        for process in &self.processes {
            let used = match process.us_per_accepted.or(process.us_per_request) {
                Some(each) => format!("{each:.1} µs each, {} ms", grouped(process.cpu_ms.round())),
                None => format!("{} ms", grouped(process.cpu_ms.round())),
            };
            writeln!(f, "  {:<26}{used}", format!("CPU of {}", process.name))?;
        }
        writeln!(
            f,
            "  {:<26}{:.0} % of {} thread{}\n",
            "harness used",
            self.generator.cpu_share * 100.0,
            self.generator.threads,
            if self.generator.threads == 1 { "" } else { "s" },
        )?;
        if self.generator.bottleneck {
            writeln!(
                f,
                "  The harness itself was probably the bottleneck: the server can do more.\n"
            )?;
        }
        Ok(())
    }
}

impl Display for Outcomes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, count: String| writeln!(f, "  {name:<22}{count:>10}");
        line("accepted", grouped(self.accepted))?;
        if self.replayed > 0 {
            line("  by replay", grouped(self.replayed))?;
        }
        for (kind, reasons) in [
            ("refused", &self.refused),
            ("failed", &self.failed),
            ("unknown", &self.unknown),
        ] {
            line(kind, grouped(reasons.values().sum::<usize>()))?;
            for (reason, count) in reasons {
                line(&format!("  {reason}"), grouped(count))?;
            }
        }
        if self.retries > 0 {
            line("tried again", grouped(self.retries))?;
        }
        writeln!(f)
    }
}

impl Display for Speed {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<22}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "latency in ms", "p50", "p90", "p99", "p99.9", "max"
        )?;
        let known = [
            ("planned → answer", &self.latency_ms.all),
            ("  accepted", &self.latency_ms.accepted),
            ("  refused", &self.latency_ms.refused),
            ("planned → sent", &self.latency_ms.send_delay),
            ("sent → answer", &self.latency_ms.service),
        ];
        let other = self.other_ms.iter();
        for (name, percentiles) in known
            .into_iter()
            .chain(other.map(|(name, percentiles)| (name.as_str(), percentiles)))
        {
            let Percentiles {
                p50,
                p90,
                p99,
                p99_9,
                max,
                count,
                ..
            } = percentiles;
            if *count > 0 {
                writeln!(
                    f,
                    "  {name:<22}{p50:>10.1}{p90:>10.1}{p99:>10.1}{p99_9:>10.1}{max:>10.1}"
                )?;
            }
        }
        writeln!(f)?;
        let mut line = |name: &str, value: String| writeln!(f, "  {name:<26}{value}");
        line("requests/s", grouped(self.requests_per_s.round()))?;
        line("accepted/s", grouped(self.accepted_per_s.round()))?;
        let after = |ms: f64| format!("{ms:.0} ms after the opening");
        line(
            "sold out",
            self.sold_out_after_ms.map_or("no".to_owned(), after),
        )?;
        line(
            "last order stored",
            self.stored_after_ms.map_or("unknown".to_owned(), after),
        )
    }
}

impl Display for Effect {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n  {:<22}{:>10}{:>10}{:>10}{:>10}",
            "PostgreSQL away", "purchases", "p50", "p99", "max"
        )?;
        for (name, part) in [
            ("before", &self.before_ms),
            ("during", &self.during_ms),
            ("while it catches up", &self.draining_ms),
            ("after", &self.after_ms),
        ] {
            let Percentiles {
                count,
                p50,
                p99,
                max,
                ..
            } = part;
            let count = grouped(count);
            writeln!(
                f,
                "  {name:<22}{count:>10}{p50:>10.1}{p99:>10.1}{max:>10.1}"
            )?;
        }
        writeln!(
            f,
            "\n  away for {:.1} s; {} orders were not stored then, and were {:.1} s later; \
             p99 during it is {:.2} of that before\n",
            self.outage_ms / 1e3,
            grouped(self.backlog),
            self.drained_ms / 1e3,
            self.p99_ratio,
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::report::sample;

    #[test]
    fn a_broken_promise_comes_first_and_leaves_no_throughput() {
        let text = sample::broken().to_string();
        let violation = "seq without gaps: oversold: 6001 orders for 6001 units exist";
        assert!(text.trim_start().starts_with("FAIL"), "{text}");
        assert!(text.lines().nth(1).unwrap().contains(violation), "{text}");
        for speed in ["accepted/s", "p99", "accepted_to_hello", "µs"] {
            assert!(!text.contains(speed), "{speed} in {text}");
        }
    }

    #[test]
    fn goals_have_a_mark() {
        let text = sample::run(7).to_string();
        assert!(text.trim_start().starts_with("PASS"), "{text}");
        assert!(text.contains("✓ accepted_to_hello"), "{text}");
        assert!(text.contains("✗ application_cpu_to_hello"), "{text}");
        let text = sample::suite().to_string();
        assert!(text.contains("✓ accepted/s ÷ hello"), "{text}");
        assert!(text.contains("✗ CPU per order ÷ hello"), "{text}");
        assert!(text.contains("– SSE subscribers"), "{text}");
    }
}
