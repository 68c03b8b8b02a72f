//! What a run says on the terminal when it is over: the verdict first.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

use super::document::{Arrivals, Figure, Outcomes, Percentiles, Phase, Run, Speed, Verdict};
use crate::scenarios::outage::Effect;
use crate::verdict::Status;

/// A JSON value as a person reads it: text without its quotes.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// A count with a comma between thousands.
fn grouped(number: impl Display) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
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
        for phase in &self.phases {
            phase.fmt(f)?;
        }
        self.goals(f)?;
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
    /// The figures that have a goal.
    fn goals(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut figures = self.figures.iter();
        if figures.all(|figure| figure.goal.is_none()) {
            return Ok(());
        }
        writeln!(f, "    {:<30}{:>14}{:>16}", "figure", "measured", "goal")?;
        for figure in &self.figures {
            let Some(goal) = &figure.goal else { continue };
            let mark = if goal.is_met(figure.value) {
                "✓"
            } else {
                "✗"
            };
            let measured = show_figure(figure);
            let wanted = format!("{} {}", goal.op.sign(), number(goal.value));
            writeln!(f, "  {mark} {:<30}{measured:>14}{wanted:>16}", figure.name)?;
        }
        writeln!(f)
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

/// A figure with its unit.
fn show_figure(figure: &Figure) -> String {
    format!("{} {}", number(figure.value), figure.unit)
        .trim_end()
        .to_owned()
}

/// A number with as many digits as say something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => grouped(value.round()),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

impl Display for Phase {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let arrivals = match self.arrivals {
            Arrivals::Rate { per_s } => format!("at {}/s", grouped(per_s)),
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
    use super::*;

    #[test]
    fn counts_are_grouped_by_thousands() {
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"],
            [0, 999, 1000, 1_234_567].map(grouped)
        );
    }

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        assert_eq!(
            ["12,346", "123", "12.3", "0.51"],
            [12_345.6, 123.4, 12.34, 0.512].map(number)
        );
    }
}
