//! The report as one page that needs nothing else: no script, no font, no picture from anywhere.

use std::fmt::Display;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::charts::{self, Chart};
use super::document::{
    Arrivals, Document, Figure, Goal, Machine, Percentiles, Phase, Ratio, Run, Series, Suite, Term,
    Verdict, Versions,
};
use super::plot::{Place, STYLE, put};
use super::text::{Escaped, grouped, number};
use crate::operator::Audit;
use crate::verdict::{Check, Status};

/// The browser is told, too, that nothing comes from anywhere.
const HEAD: &str = "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src \
'unsafe-inline'\">\n";

/// Rows that the table beside a plot has at most.
const TABLE_ROWS: usize = 60;

/// Figures that stand above everything else.
const TILES: usize = 7;

/// The page of a document.
pub(crate) fn page(document: &Document) -> String {
    let mut page = Page(HEAD.to_owned());
    let title = match document {
        Document::Run(run) => format!("{} — stockade-bench", run.scenario),
        Document::Suite(_) => "suite — stockade-bench".to_owned(),
    };
    page.add(format_args!(
        "<title>{}</title>\n<style>\n{}{STYLE}\n</style>\n</head>\n<body>\n<main>\n",
        Escaped(&title),
        include_str!("page.css"),
    ));
    match document {
        Document::Run(run) => page.run(run),
        Document::Suite(suite) => page.suite(suite),
    }
    page.add(format_args!("</main>\n</body>\n</html>\n"));
    page.0
}

/// A page under construction. Every text in it goes through [`Escaped`].
struct Page(String);

impl Page {
    fn add(&mut self, what: std::fmt::Arguments<'_>) {
        put(&mut self.0, what);
    }

    fn run(&mut self, run: &Run) {
        self.title(&run.scenario, run.started_at, &run.machine, &run.versions);
        self.verdict(run.verdict, &verdict_of(run));
        self.findings(run);
        self.heading("Promises", "Judged from the whole history of the run.");
        self.checks(&run.checks, run.audit.as_ref());
        self.about(&run.command, &run.machine, &run.versions);
        self.settings(run);
        self.how_to_read();
    }

    fn suite(&mut self, suite: &Suite) {
        self.title("suite", suite.started_at, &suite.machine, &suite.versions);
        let broken = suite.runs.iter().filter(|run| run.verdict == Verdict::Fail);
        let words: Vec<String> = broken
            .map(|run| format!("{}: {}", run.scenario, verdict_of(run)))
            .collect();
        let words = if words.is_empty() {
            format!("Every promise was kept in {} runs.", suite.runs.len())
        } else {
            words.join("; ")
        };
        self.verdict(suite.verdict, &words);
        self.ratios(&suite.goals);
        for run in &suite.runs {
            self.add(format_args!(
                "<details class=\"part\"><summary>{} {}</summary>\n",
                Escaped(&run.scenario),
                mark(run.verdict == Verdict::Pass),
            ));
            self.findings(run);
            if !run.checks.is_empty() {
                self.heading("Promises", "");
                self.checks(&run.checks, run.audit.as_ref());
            }
            self.heading("Command", "");
            self.add(format_args!("<pre>{}</pre>\n", Escaped(&run.command)));
            self.settings(run);
            self.add(format_args!("</details>\n"));
        }
        self.about(&suite.command, &suite.machine, &suite.versions);
        self.how_to_read();
    }

    fn title(&mut self, name: &str, at: DateTime<Utc>, machine: &Machine, versions: &Versions) {
        self.add(format_args!(
            "<header>\n<h1>Stockade · {}</h1>\n<p class=\"soft\">{} · {} · {}</p>\n</header>\n",
            Escaped(name),
            at.format("%-d %B %Y, %H:%M UTC"),
            Escaped(&commit(versions)),
            Escaped(&format!(
                "{} cores, {}",
                machine.cores,
                bytes(machine.memory_bytes)
            )),
        ));
    }

    fn verdict(&mut self, verdict: Verdict, words: &str) {
        let (class, word) = match verdict {
            Verdict::Pass => ("verdict", "PASS"),
            Verdict::Fail => ("verdict fail", "FAIL"),
        };
        self.add(format_args!(
            "<div class=\"{class}\" role=\"status\"><b>{word}</b><span>{}</span></div>\n",
            Escaped(words)
        ));
    }

    /// What was measured: figures, phases, plots.
    fn findings(&mut self, run: &Run) {
        self.tiles(run);
        if run.figures.iter().any(|figure| figure.goal.is_some()) {
            self.heading("Goals", "");
            self.goals(&run.figures);
        }
        if run.phases.len() > 1 {
            self.heading("Phases", "");
            self.phases(&run.phases);
        }
        let charts = charts::of_run(run);
        if !charts.is_empty() {
            self.heading("The whole run", "");
            self.plots(&charts);
        }
        let largest = run
            .phases
            .iter()
            .map(|phase| phase.outcomes.purchases)
            .max();
        for phase in &run.phases {
            // Of many phases the largest is open: what it shows is the least by chance.
            let is_open = run.phases.len() <= 2 || largest == Some(phase.outcomes.purchases);
            let open = if is_open { " open" } else { "" };
            self.add(format_args!(
                "<details class=\"part\"{open}><summary>{}</summary>\n",
                Escaped(&phase.name)
            ));
            self.phase(phase, is_open);
            self.add(format_args!("</details>\n"));
        }
        if let Some(outage) = &run.outage {
            self.heading(
                "PostgreSQL away",
                &format!(
                    "For {} s. {} orders were not stored then, and were {} s later. The 99th \
                     percentile during it is {} times that before.",
                    number(outage.outage_ms / 1e3),
                    grouped(outage.backlog),
                    number(outage.drained_ms / 1e3),
                    number(outage.p99_ratio),
                ),
            );
            self.durations(&[
                ("before", &outage.before_ms),
                ("during", &outage.during_ms),
                ("while it catches up", &outage.draining_ms),
                ("after", &outage.after_ms),
            ]);
        }
        if run.figures.iter().any(|figure| figure.goal.is_none()) {
            self.add(format_args!(
                "<details><summary>All figures by name</summary>\n"
            ));
            let rows = run
                .figures
                .iter()
                .map(|figure| vec![Cell::text(&figure.name), Cell::number(show(figure))]);
            self.table(&["figure", "measured"], rows);
            self.add(format_args!("</details>\n"));
        }
    }

    /// The numbers that people look for first.
    fn tiles(&mut self, run: &Run) {
        let mut tiles: Vec<(String, String, String)> = Vec::new();
        let mut tile = |name: &str, value: String, unit: &str| {
            tiles.push((name.to_owned(), value, unit.to_owned()));
        };
        match run.phases.as_slice() {
            [phase] => {
                if let Some(speed) = &phase.speed {
                    let latency = &speed.latency_ms.all;
                    tile("accepted", number(speed.accepted_per_s.round()), "/s");
                    tile("answered", number(speed.requests_per_s.round()), "/s");
                    tile("p50", number(latency.p50), "ms");
                    tile("p99", number(latency.p99), "ms");
                    tile("p99.9", number(latency.p99_9), "ms");
                }
                tile("purchases", grouped(phase.outcomes.purchases), "");
                tile("orders", grouped(phase.outcomes.accepted), "");
            }
            _ => {
                let of_the_run = run.figures.iter().filter(|figure| figure.is_of_the_run());
                for figure in of_the_run.take(TILES) {
                    let unit = figure.unit.as_str();
                    // The unit stands beside the number.
                    let ends = ["_per_s", "_ms", "_bytes"];
                    let name = ends.iter().find_map(|end| figure.name.strip_suffix(end));
                    let name = name.unwrap_or(&figure.name).replace('_', " ");
                    tile(&name, number(figure.value), unit);
                }
            }
        }
        let goals = run.figures.iter().filter_map(|figure| figure.met);
        let met = goals.clone().filter(|met| *met).count();
        let all = goals.count();
        if all > 0 {
            tile("goals reached", met.to_string(), &format!("of {all}"));
        }
        if tiles.is_empty() {
            return;
        }
        self.add(format_args!("<dl class=\"tiles\">\n"));
        for (name, value, unit) in tiles {
            self.add(format_args!(
                "<div><dt>{}</dt><dd>{} <small>{}</small></dd></div>\n",
                Escaped(&name),
                Escaped(&value),
                Escaped(&unit)
            ));
        }
        self.add(format_args!("</dl>\n"));
    }

    fn goals(&mut self, figures: &[Figure]) {
        let rows = figures.iter().filter_map(|figure| {
            let goal = figure.goal.as_ref()?;
            Some(vec![
                Cell::text(&figure.name),
                Cell::number(show(figure)),
                Cell::number(wanted(goal)),
                Cell::mark(goal.is_met(figure.value)),
                Cell::bar(figure.value, goal),
            ])
        });
        self.table(&["figure", "measured", "goal", "", "of the goal"], rows);
    }

    fn ratios(&mut self, goals: &[Ratio]) {
        self.heading(
            "Goals",
            "Ratios of runs on one machine, one after the other. The line in each bar is the goal.",
        );
        let term = |term: &Term| match term.value {
            Some(value) => format!("{} {} ({})", number(value), term.unit, term.name),
            None => format!("not measured ({})", term.name),
        };
        let rows = goals.iter().map(|ratio| {
            let reference = ratio.reference.as_ref().map_or(String::new(), term);
            vec![
                Cell::text(&ratio.what),
                Cell::text(&term(&ratio.measured)),
                Cell::text(&reference),
                Cell::number(ratio.value.map_or("–".to_owned(), number)),
                Cell::number(wanted(&ratio.goal)),
                ratio.met.map_or(Cell::text("–"), Cell::mark),
                match ratio.value {
                    Some(value) => Cell::bar(value, &ratio.goal),
                    None => Cell::text(""),
                },
            ]
        });
        let heads = [
            "what",
            "measured",
            "against",
            "ratio",
            "goal",
            "",
            "of the goal",
        ];
        self.table(&heads, rows);
    }

    fn phases(&mut self, phases: &[Phase]) {
        let rows = phases.iter().map(|phase| {
            let speed = phase.speed.as_ref();
            let of = |of: fn(&Percentiles) -> f64| {
                let latency = speed.map(|speed| of(&speed.latency_ms.all));
                Cell::number(latency.map_or("–".to_owned(), number))
            };
            let rate = |rate: Option<f64>| Cell::number(rate.map_or("–".to_owned(), number));
            vec![
                Cell::text(&phase.name),
                Cell::text(&arrivals(phase.arrivals)),
                rate(speed.map(|speed| speed.requests_per_s)),
                rate(speed.map(|speed| speed.accepted_per_s)),
                of(|latency| latency.p50),
                of(|latency| latency.p99),
                of(|latency| latency.p99_9),
                of(|latency| latency.max),
                Cell::number(format!("{:.0} %", phase.generator.cpu_share * 100.0)),
            ]
        });
        let heads = [
            "phase",
            "arrivals",
            "answered/s",
            "accepted/s",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "max ms",
            "harness",
        ];
        self.table(&heads, rows);
    }

    fn phase(&mut self, phase: &Phase, with_hints: bool) {
        let generator = &phase.generator;
        self.add(format_args!(
            "<p class=\"note\">{} purchases {}, over {} connections, in {} s. The harness used \
             {:.0} % of {} thread{}; {} tries left late although a connection was \
             free.{}</p>\n",
            grouped(phase.outcomes.purchases),
            Escaped(&arrivals(phase.arrivals)),
            grouped(phase.connections),
            number(phase.duration_ms / 1e3),
            generator.cpu_share * 100.0,
            generator.threads,
            if generator.threads == 1 { "" } else { "s" },
            grouped(generator.late),
            if generator.bottleneck {
                " <b class=\"no\">The harness itself was probably the bottleneck: the server can \
                 do more.</b>"
            } else {
                ""
            },
        ));
        if let Some(speed) = &phase.speed {
            let latency = &speed.latency_ms;
            let mut rows = vec![
                ("planned → answer", &latency.all),
                ("of these accepted", &latency.accepted),
                ("of these refused", &latency.refused),
                ("planned → sent", &latency.send_delay),
                ("sent → answer", &latency.service),
            ];
            rows.extend(speed.other_ms.iter().map(|(name, of)| (name.as_str(), of)));
            let charts = charts::of_phase(phase).into_iter();
            // Hints are most of a plot, and few people open every phase.
            let charts = charts.map(|chart| if with_hints { chart } else { chart.plain() });
            self.plots(&charts.collect::<Vec<_>>());
            self.heading("Latency", "");
            self.durations(&rows);
            self.series(&speed.series);
        }
        self.outcomes(phase);
        if !phase.processes.is_empty() {
            self.heading("Processes", "");
            let rows = phase.processes.iter().map(|process| {
                let us = |us: Option<f64>| Cell::number(us.map_or("–".to_owned(), number));
                vec![
                    Cell::text(&process.name),
                    Cell::number(number(process.cpu_ms)),
                    us(process.us_per_accepted),
                    us(process.us_per_request),
                    Cell::number(process.rss_bytes.map_or("–".to_owned(), bytes)),
                ]
            });
            let heads = [
                "process",
                "CPU ms",
                "µs per order",
                "µs per purchase",
                "memory",
            ];
            self.table(&heads, rows);
        }
    }

    fn durations(&mut self, rows: &[(&str, &Percentiles)]) {
        let rows = rows
            .iter()
            .filter(|(_, of)| of.count > 0)
            .map(|(name, of)| {
                let ms = |ms: f64| Cell::number(number(ms));
                vec![
                    Cell::text(name),
                    Cell::number(grouped(of.count)),
                    ms(of.mean),
                    ms(of.p50),
                    ms(of.p90),
                    ms(of.p99),
                    ms(of.p99_9),
                    ms(of.max),
                ]
            });
        let heads = [
            "in ms", "count", "mean", "p50", "p90", "p99", "p99.9", "max",
        ];
        self.table(&heads, rows);
    }

    fn outcomes(&mut self, phase: &Phase) {
        let outcomes = &phase.outcomes;
        let mut rows = vec![("accepted".to_owned(), outcomes.accepted)];
        if outcomes.replayed > 0 {
            rows.push(("accepted, by replay".to_owned(), outcomes.replayed));
        }
        for (kind, reasons) in [
            ("refused", &outcomes.refused),
            ("failed", &outcomes.failed),
            ("unknown", &outcomes.unknown),
        ] {
            for (reason, count) in reasons {
                rows.push((format!("{kind}: {reason}"), *count));
            }
        }
        if outcomes.retries > 0 {
            let retries = usize::try_from(outcomes.retries).unwrap_or(usize::MAX);
            rows.push(("requests beyond the first".to_owned(), retries));
        }
        self.heading("Outcomes", "");
        let rows = rows
            .iter()
            .map(|(kind, count)| vec![Cell::text(kind), Cell::number(grouped(count))]);
        self.table(&["outcome", "purchases"], rows);
    }

    /// The numbers behind the plots over time, thinned out to what a person reads.
    fn series(&mut self, series: &Series) {
        self.add(format_args!(
            "<details><summary>The plots over time as a table</summary>\n"
        ));
        let step = series.rows.len().div_ceil(TABLE_ROWS).max(1);
        let rows = series.rows.iter().step_by(step).map(|row| {
            let ms = |ms: Option<f64>| Cell::number(ms.map_or("–".to_owned(), number));
            vec![
                Cell::number(number(row.at_ms)),
                Cell::number(grouped(row.sent)),
                Cell::number(grouped(row.accepted)),
                Cell::number(grouped(row.refused.values().sum::<u64>())),
                Cell::number(grouped(row.failed)),
                ms(row.p50_ms),
                ms(row.p99_ms),
                ms(row.max_ms),
                Cell::number(row.remaining.map_or("–".to_owned(), grouped)),
            ]
        });
        let heads = [
            "from ms",
            "sent",
            "accepted",
            "refused",
            "given up",
            "p50 ms",
            "p99 ms",
            "max ms",
            "remaining",
        ];
        self.table(&heads, rows);
        if step > 1 {
            self.add(format_args!(
                "<p class=\"note\">Every {step}th interval of {} ms; the JSON document has all.</p>\n",
                number(series.interval_ms)
            ));
        }
        self.add(format_args!("</details>\n"));
    }

    fn plots(&mut self, charts: &[Chart]) {
        self.add(format_args!("<div class=\"plots\">\n"));
        for chart in charts {
            self.add(format_args!(
                "<figure><h3>{}</h3><figcaption>{}</figcaption>{}</figure>\n",
                Escaped(&chart.title),
                Escaped(&chart.summary),
                chart.svg(Place::Page),
            ));
        }
        self.add(format_args!("</div>\n"));
    }

    fn checks(&mut self, checks: &[Check], audit: Option<&Audit>) {
        let rows = checks.iter().map(|check| {
            let actual = check.counter_example.join("\n");
            vec![
                match check.status {
                    Status::Pass => Cell::mark(true),
                    Status::Fail => Cell::mark(false),
                    Status::Skipped => Cell::text("–"),
                },
                Cell::text(&check.name),
                Cell::text(&check.expected),
                Cell::with_events(&check.actual, &actual),
            ]
        });
        self.table(&["", "promise", "expected", "actual"], rows);
        let Some(audit) = audit else { return };
        self.add(format_args!(
            "<details><summary>The server's own audit: {}</summary>\n",
            Escaped(&audit.verdict)
        ));
        let rows = audit.checks.iter().map(|check| {
            vec![
                Cell::mark(check.status == "pass"),
                Cell::text(&check.name),
                Cell::text(&plain(&check.expected)),
                Cell::text(&plain(&check.actual)),
            ]
        });
        self.table(&["", "invariant", "expected", "actual"], rows);
        self.add(format_args!("</details>\n"));
    }

    fn about(&mut self, command: &str, machine: &Machine, versions: &Versions) {
        self.heading("Where it ran", "");
        self.add(format_args!("<pre>{}</pre>\n", Escaped(command)));
        let unknown = || "unknown".to_owned();
        self.facts(&[
            (
                "processor",
                format!("{}, {} cores", machine.cpu, machine.cores),
            ),
            ("memory", bytes(machine.memory_bytes)),
            ("kernel", machine.kernel.clone()),
            (
                "load before",
                machine.load_before.map_or_else(unknown, number),
            ),
            (
                "Stockade",
                format!("{}, {}", versions.stockade, commit(versions)),
            ),
            ("Redis", versions.redis.clone().unwrap_or_else(unknown)),
            (
                "PostgreSQL",
                versions.postgres.clone().unwrap_or_else(unknown),
            ),
        ]);
    }

    fn settings(&mut self, run: &Run) {
        let mut facts = vec![("seed", run.seed.to_string())];
        let settings = run.settings.iter();
        facts.extend(settings.map(|(name, value)| (name.as_str(), plain(value))));
        self.add(format_args!("<details><summary>Settings</summary>\n"));
        self.facts(&facts);
        self.add(format_args!("</details>\n"));
    }

    fn facts(&mut self, facts: &[(&str, String)]) {
        self.add(format_args!("<dl class=\"facts\">\n"));
        for (name, value) in facts {
            self.add(format_args!(
                "<dt>{}</dt><dd>{}</dd>\n",
                Escaped(name),
                Escaped(value)
            ));
        }
        self.add(format_args!("</dl>\n"));
    }

    fn how_to_read(&mut self) {
        self.heading("How to read this", "");
        self.add(format_args!(
            "<p class=\"note\">The instant of every purchase is planned before the opening, and \
             latency counts from that instant to the final answer, retries included: a slow \
             answer delays nothing and hides nothing. <i>Planned → sent</i> is what a purchase \
             waited for a free connection, <i>sent → answer</i> what a closed model would have \
             shown. Client, server, Redis and PostgreSQL share the machine. A run that breaks a \
             promise has no throughput.</p>\n"
        ));
    }

    fn heading(&mut self, heading: &str, note: &str) {
        self.add(format_args!("<h2>{}</h2>\n", Escaped(heading)));
        if !note.is_empty() {
            self.add(format_args!("<p class=\"note\">{}</p>\n", Escaped(note)));
        }
    }

    fn table(&mut self, heads: &[&str], rows: impl Iterator<Item = Vec<Cell>>) {
        let mut rows = rows.peekable();
        // A column of numbers has its name above the numbers.
        let is_number: Vec<bool> = rows.peek().map_or(Vec::new(), |row| {
            row.iter().map(|cell| cell.class == "n").collect()
        });
        self.add(format_args!(
            "<div class=\"scroll\" tabindex=\"0\"><table><thead><tr>"
        ));
        for (n, head) in heads.iter().enumerate() {
            let class = if is_number.get(n) == Some(&true) {
                " class=\"n\""
            } else {
                ""
            };
            self.add(format_args!(
                "<th scope=\"col\"{class}>{}</th>",
                Escaped(head)
            ));
        }
        self.add(format_args!("</tr></thead><tbody>\n"));
        for row in rows {
            self.add(format_args!("<tr>"));
            for Cell { class, html } in row {
                self.add(format_args!("<td class=\"{class}\">{html}</td>"));
            }
            self.add(format_args!("</tr>\n"));
        }
        self.add(format_args!("</tbody></table></div>\n"));
    }
}

/// One cell of a table, already escaped.
struct Cell {
    class: &'static str,
    html: String,
}

impl Cell {
    fn text(text: &str) -> Self {
        Self {
            class: "",
            html: Escaped(text).to_string(),
        }
    }

    fn number(text: impl Display) -> Self {
        Self {
            class: "n",
            html: Escaped(&text.to_string()).to_string(),
        }
    }

    fn mark(is_good: bool) -> Self {
        Self {
            class: if is_good { "yes" } else { "no" },
            html: mark(is_good).to_owned(),
        }
    }

    fn with_events(text: &str, events: &str) -> Self {
        let mut cell = Self::text(text);
        if !events.is_empty() {
            put(
                &mut cell.html,
                format_args!("<pre>{}</pre>", Escaped(events)),
            );
        }
        cell
    }

    /// How far a value is, with the goal as a line in the middle; a bar ends at twice the goal.
    fn bar(value: f64, goal: &Goal) -> Self {
        let share = if goal.value > 0.0 {
            (value / goal.value / 2.0).clamp(0.0, 1.0)
        } else {
            0.0
        };
        let class = if goal.is_met(value) { "good" } else { "short" };
        Self {
            class: "bar",
            html: format!(
                "<svg viewBox=\"0 0 200 12\" preserveAspectRatio=\"none\" role=\"img\">\
                 <title>{:.0} % of the goal</title>\
                 <rect class=\"track\" width=\"200\" height=\"12\" rx=\"3\"/>\
                 <rect class=\"{class}\" width=\"{:.1}\" height=\"12\" rx=\"3\"/>\
                 <path class=\"goal\" d=\"M100 0v12\"/></svg>",
                share * 200.0,
                share * 200.0,
            ),
        }
    }
}

fn mark(is_good: bool) -> &'static str {
    if is_good { "✓" } else { "✗" }
}

fn verdict_of(run: &Run) -> String {
    match (&run.first_violation, run.verdict) {
        (Some(violation), _) => violation.clone(),
        (None, Verdict::Fail) => "A promise was broken, or could not be checked.".to_owned(),
        (None, Verdict::Pass) if run.checks.is_empty() => {
            "Nothing was promised here: this is a yardstick.".to_owned()
        }
        (None, Verdict::Pass) => format!("Every promise was kept: {} checks.", run.checks.len()),
    }
}

fn show(figure: &Figure) -> String {
    format!("{} {}", number(figure.value), figure.unit)
}

fn wanted(goal: &Goal) -> String {
    let sign = match goal.op.sign() {
        ">=" => "≥",
        "<=" => "≤",
        sign => sign,
    };
    format!("{sign} {}", number(goal.value))
}

fn arrivals(arrivals: Arrivals) -> String {
    match arrivals {
        Arrivals::Burst => "all at once".to_owned(),
        Arrivals::Rate { per_s } => format!("at {}/s", number(per_s)),
    }
}

fn commit(versions: &Versions) -> String {
    let changes = if versions.dirty { " with changes" } else { "" };
    match &versions.commit {
        Some(commit) => format!("commit {}{changes}", commit.get(..12).unwrap_or(commit)),
        None => "commit unknown".to_owned(),
    }
}

/// A JSON value as a person reads it: text without its quotes.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// A size with the unit that fits.
fn bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "memory is far below 2^53")]
    let mut size = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    format!("{} {unit}", number(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample::{self, HOSTILE};

    /// Everything that a page may consist of.
    const TAGS: [&str; 44] = [
        "!doctype",
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "b",
        "i",
        "div",
        "span",
        "dl",
        "dt",
        "dd",
        "small",
        "figure",
        "figcaption",
        "svg",
        "desc",
        "path",
        "rect",
        "text",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "details",
        "summary",
        "code",
        "ul",
        "li",
        "section",
        "footer",
        "a",
        "nav",
    ];

    fn pages() -> Vec<String> {
        let runs = [sample::run(7), sample::ladder(), sample::broken()];
        let mut pages: Vec<String> = runs.map(|run| page(&Document::Run(Box::new(run)))).to_vec();
        pages.push(page(&Document::Suite(Box::new(sample::suite()))));
        pages
    }

    /// The tags of a page with their attributes, in order.
    fn tags(page: &str) -> Vec<&str> {
        let parts = page.split('<').skip(1);
        parts.map(|part| part.split('>').next().unwrap()).collect()
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_believes_no_text() {
        for page in pages() {
            assert!(page.contains(&Escaped(HOSTILE).to_string()));
            for tag in tags(&page) {
                let name = tag.trim_start_matches('/').split(' ').next().unwrap();
                assert!(TAGS.contains(&name), "<{tag}>");
                for reference in ["src=", "href", "http:", "https:", "url(", "data:", "onload"] {
                    assert!(!tag.contains(reference), "<{tag}>");
                }
            }
            let style = page.split("<style>").nth(1).unwrap();
            let style = style.split("</style>").next().unwrap();
            for reference in ["@import", "url(", "http", "//"] {
                assert!(!style.contains(reference), "{reference}");
            }
        }
    }

    #[test]
    fn what_is_opened_is_closed() {
        const ALONE: [&str; 4] = ["!doctype", "meta", "path", "rect"];
        for page in pages() {
            let mut open: Vec<&str> = Vec::new();
            for tag in tags(&page) {
                if let Some(name) = tag.strip_prefix('/') {
                    assert_eq!(open.pop(), Some(name), "</{name}>");
                } else if !tag.ends_with('/') {
                    let name = tag.split(' ').next().unwrap();
                    if !ALONE.contains(&name) || name == "rect" {
                        open.push(name);
                    }
                }
            }
            assert_eq!(open, [""; 0]);
        }
    }

    #[test]
    fn a_broken_promise_leaves_no_speed() {
        let page = page(&Document::Run(Box::new(sample::broken())));
        assert!(page.contains("oversold: 6001 orders"));
        for speed in ["p99", ">/s<", " /s<", "µs", "<figure>"] {
            let body = page.split("</style>").nth(1).unwrap();
            let body = body.split("Where it ran").next().unwrap();
            // The arrivals that were asked for are no speed.
            let body = body.replace("at 5,000/s", "");
            assert!(!body.contains(speed), "{speed}");
        }
    }

    #[test]
    fn every_plot_says_what_it_shows() {
        let page = page(&Document::Run(Box::new(sample::run(7))));
        for plot in [
            "Latency by percentile",
            "Latency over time",
            "Throughput over time",
            "How purchases ended",
            "Units left",
            "Memory by process",
            "Processor time for each accepted order",
        ] {
            let named = format!("<title>{plot}</title><desc>");
            assert!(page.contains(&named), "{plot}");
        }
        assert!(page.contains("The plots over time as a table"));
    }
}
