//! How a run is doing while it goes on: a bar and a line of figures on a terminal, a plain line
//! now and then anywhere else.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{sleep, sleep_until};

use super::text::{grouped, number};
use crate::host;
use crate::load::pulse::Beat;
use crate::load::sender::Tally;

/// Between two looks at the crowd on a terminal.
const REDRAW: Duration = Duration::from_millis(50);

/// Between two new lines of figures.
const LOOK: Duration = Duration::from_millis(250);

/// What rates and percentiles are taken over.
const WINDOW: Duration = Duration::from_secs(1);

/// Between two plain lines.
const LINE: Duration = Duration::from_secs(2);

/// What is watched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene {
    /// Units for sale in all sales.
    pub(crate) units: u64,
    /// Units per purchase.
    pub(crate) quantity: u64,
    /// Threads that send.
    pub(crate) threads: usize,
}

/// A bar for so many purchases; it is hidden where there is no terminal.
///
/// # Errors
///
/// None that a user could cause.
pub(crate) fn bar(purchases: usize) -> Result<ProgressBar> {
    let style = "  {elapsed:>4} {bar:40} {human_pos} of {human_len}\n  {msg}";
    let bar = ProgressBar::new(u64::try_from(purchases)?);
    bar.set_style(ProgressStyle::with_template(style)?.progress_chars("━━─"));
    bar.enable_steady_tick(REDRAW);
    Ok(bar)
}

/// The counts at an instant.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    cpu: Duration,
    accepted: usize,
    refused: usize,
    failed: usize,
    retries: usize,
    beat: Beat,
}

impl Look {
    fn at(tally: &Tally) -> Self {
        let count = |of: &std::sync::atomic::AtomicUsize| of.load(Ordering::Relaxed);
        Self {
            at: Instant::now(),
            cpu: host::cpu_time(),
            accepted: count(&tally.accepted),
            refused: count(&tally.refused),
            failed: count(&tally.failed),
            retries: count(&tally.retries),
            beat: tally.pulse.beat(),
        }
    }

    fn ended(&self) -> usize {
        self.accepted + self.refused + self.failed
    }

    /// What happened since another look, in one line.
    fn line(&self, since: &Self, scene: &Scene) -> String {
        let seconds = (self.at - since.at).as_secs_f64().max(1e-3);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (rate, threads) = (
            (self.ended() - since.ended()) as f64 / seconds,
            scene.threads as f64,
        );
        let busy = self.cpu.saturating_sub(since.cpu).as_secs_f64() / seconds / threads;
        let sold = u64::try_from(self.accepted).unwrap_or(u64::MAX);
        let left = scene
            .units
            .saturating_sub(sold.saturating_mul(scene.quantity));
        let mut parts = vec![
            format!("{} left", grouped(left)),
            format!("{}/s", grouped(rate.round())),
        ];
        let lately = self.beat.since(&since.beat);
        if let (Some(p50), Some(p99)) = (lately.quantile(0.5), lately.quantile(0.99)) {
            let ms = |duration: Duration| number(duration.as_secs_f64() * 1e3);
            parts.push(format!("p50 {} ms, p99 {} ms", ms(p50), ms(p99)));
        }
        parts.push(format!("{} accepted", grouped(self.accepted)));
        for (count, what) in [
            (self.refused, "refused"),
            (self.failed, "failed"),
            (self.retries, "tried again"),
        ] {
            if count > 0 {
                parts.push(format!("{} {what}", grouped(count)));
            }
        }
        parts.push(format!("harness {:.0} %", busy * 100.0));
        parts.join(" · ")
    }
}

/// Shows how the crowd is doing, until it is stopped.
pub(crate) async fn watch(bar: ProgressBar, tally: Arc<Tally>, scene: Scene, opening: Instant) {
    sleep_until(opening.into()).await;
    let mut looks = VecDeque::from([Look::at(&tally)]);
    loop {
        let pause = if bar.is_hidden() { LINE } else { REDRAW };
        sleep(pause).await;
        bar.set_position(u64::try_from(tally.ended()).unwrap_or(u64::MAX));
        if looks.back().is_some_and(|last| last.at.elapsed() < LOOK) {
            continue;
        }
        let look = Look::at(&tally);
        // The youngest of those that are old enough.
        while looks.get(1).is_some_and(|next| look.at - next.at >= WINDOW) {
            looks.pop_front();
        }
        let line = looks.front().map(|since| look.line(since, &scene));
        let line = line.unwrap_or_default();
        if bar.is_hidden() {
            let seconds = opening.elapsed().as_secs();
            // Nobody is left to tell when the terminal is gone.
            let _ = writeln!(io::stderr().lock(), "  {seconds:>4} s  {line}");
        } else {
            bar.set_message(line);
        }
        looks.push_back(look);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_happened_since_the_last_one() {
        let tally = Tally::default();
        let scene = Scene {
            units: 5000,
            quantity: 2,
            threads: 1,
        };
        let mut before = Look::at(&tally);
        tally.accepted.store(2000, Ordering::Relaxed);
        tally.refused.store(1000, Ordering::Relaxed);
        for _ in 0..3000 {
            tally.pulse.record(Duration::from_millis(4));
        }
        let mut after = Look::at(&tally);
        (before.cpu, after.cpu) = (Duration::ZERO, Duration::from_millis(500));
        before.at = after.at.checked_sub(WINDOW).unwrap();
        assert_eq!(
            after.line(&before, &scene),
            "1,000 left · 3,000/s · p50 4.10 ms, p99 4.10 ms · 2,000 accepted · \
             1,000 refused · harness 50 %"
        );
        before = after.clone();
        before.at = after.at.checked_sub(WINDOW).unwrap();
        let line = after.line(&before, &scene);
        assert!(
            line.starts_with("1,000 left · 0/s · 2,000 accepted"),
            "{line}"
        );
    }
}
