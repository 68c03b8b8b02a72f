//! A scenario under way: a server, the crowds that are sent at it one after the other, and what
//! they found.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::clock;
use crate::load::crowd::{Arrivals, Crowd};
use crate::redis_info;
use crate::report::{
    self, Begun, Findings, Generator, Live, Machine, Offered, Percentiles, Phase, Process, Run,
    Sample, Versions, ms,
};
use crate::sale_run::{Crowded, Judged, SaleRun, Server, Wish};
use crate::sse::Frame;
use crate::stage::{Stage, Where};
use crate::usage::{Family, Look, Usage};
use crate::verdict::{self, Check, Status};

/// What every scenario with a server of its own takes.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Common {
    #[command(flatten)]
    pub(crate) place: Where,
    /// Threads that drive the connections. One leaves most of a small machine to the server.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=256))]
    pub(crate) threads: u64,
    /// Repeats the randomness of an earlier run.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

/// A scenario under way.
pub(crate) struct Bench {
    pub(crate) server: Server,
    /// None: the server runs by itself.
    pub(crate) stage: Option<Stage>,
    pub(crate) findings: Findings,
    seed: u64,
    threads: usize,
    /// Of each sale so far.
    checks: Vec<Vec<Check>>,
    begun: Begun,
}

/// One crowd that was sent and judged.
pub(crate) struct Trial {
    pub(crate) crowded: Crowded,
    /// Until the last acceptance.
    pub(crate) accepted_per_s: f64,
    /// Where it is among the phases.
    phase: usize,
}

/// A promise was broken: the scenario ends, and its run says which.
#[derive(Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a promise was broken")
    }
}

impl std::error::Error for Broken {}

/// Makes a run of a scenario: starts the server if there is none, and stops it whatever happens.
///
/// # Errors
///
/// The run could not be made.
pub(crate) fn run(
    scenario: &'static str,
    common: &Common,
    steps: impl AsyncFnOnce(&mut Bench) -> Result<()>,
) -> Result<Run> {
    // The crowd has threads of its own; this one watches.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::select! {
            run = whole(scenario, common, steps) => run,
            // Whatever was started ends when it is dropped.
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        }
    })
}

async fn whole(
    scenario: &'static str,
    common: &Common,
    steps: impl AsyncFnOnce(&mut Bench) -> Result<()>,
) -> Result<Run> {
    let (started_at, machine) = (clock::now(), Machine::here());
    let (server, stage) = common.place.server().await?;
    let seed = common.seed.unwrap_or_else(rand::random);
    let settings = [
        ("server".to_owned(), json!(common.place.url)),
        ("server_env".to_owned(), json!(common.place.server_env)),
        ("threads".to_owned(), json!(common.threads)),
    ];
    let mut bench = Bench {
        server,
        stage,
        findings: Findings::default(),
        seed,
        threads: usize::try_from(common.threads)?,
        checks: Vec::new(),
        begun: Begun {
            scenario,
            started_at,
            seed,
            machine,
            versions: Versions::here(),
            settings: settings.into_iter().collect(),
        },
    };
    bench.versions().await;
    match steps(&mut bench).await {
        Err(error) if !error.is::<Broken>() => return Err(error),
        _ => {}
    }
    let mut findings = bench.findings;
    findings.checks.splice(0..0, verdict::of_all(bench.checks));
    if let Some(stage) = bench.stage {
        stage.stop().await?;
    }
    Ok(Run::new(bench.begun, findings))
}

impl Bench {
    /// A crowd in which everybody buys one unit, once, with a seed of its own.
    pub(crate) fn crowd(&mut self, buyers: usize, arrivals: Arrivals) -> Crowd {
        self.seed = self.seed.wrapping_add(1);
        Crowd::once(buyers, arrivals, self.seed)
    }

    /// Threads that drive the connections of a crowd.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Says what was asked for.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.begun.settings.insert(name.to_owned(), value.into());
    }

    /// Notes a number to quote.
    pub(crate) fn figure(&mut self, figure: report::Figure) {
        self.findings.figures.push(figure);
    }

    /// The stage, for what cannot be done to a server that runs by itself.
    pub(crate) fn stage(&mut self) -> Result<&mut Stage> {
        self.stage
            .as_mut()
            .context("this needs a server of the run's own: leave --url away")
    }

    /// Sends a crowd, waits until what it bought is stored, and judges.
    ///
    /// # Errors
    ///
    /// It could not be sent, or a promise was broken: then the scenario is over.
    pub(crate) async fn trial(&mut self, name: &str, wish: Wish) -> Result<Trial> {
        self.trial_with(name, wish, true).await
    }

    /// The same without a writer: it is started once the crowd is over, so that everything can be
    /// judged.
    pub(crate) async fn trial_without_writer(&mut self, name: &str, wish: Wish) -> Result<Trial> {
        self.stage()?.stop_writer().await?;
        self.trial_with(name, wish, false).await
    }

    async fn trial_with(&mut self, name: &str, wish: Wish, with_writer: bool) -> Result<Trial> {
        let wish = Wish {
            threads: self.threads,
            ..wish
        };
        let mut run = SaleRun::prepare(&self.server, wish).await?;
        let roots = self.stage.as_ref().map(Stage::roots);
        let mut crowded = run.send(roots.clone()).await?;
        if !with_writer {
            self.stage()?.start_writer()?;
        }
        run.settle(&mut crowded).await;
        // The writer's work ends later than the crowd's.
        let settled = roots.map(|roots| roots.look()).transpose()?;
        let mut phase = phase(name, &run, &crowded)?;
        if let Some(settled) = settled.filter(|_| with_writer) {
            processes(&mut phase, &crowded, &settled);
        } else if let Some((_, last)) = crowded.looks.last().cloned() {
            processes(&mut phase, &crowded, &last);
        }
        let judged = run.judge(&crowded).await?;
        if let Some(speed) = &mut phase.speed {
            speed.sold_out_after_ms = judged.sold_out_after().map(ms);
            speed.stored_after_ms = crowded.stored_after().map(ms);
            if let [history] = &*judged.histories
                && with_writer
            {
                let lags = Percentiles::of(crowded.lags(history).into_iter())?;
                speed.other_ms.insert("201 to row".to_owned(), lags);
            }
        }
        let trial = Trial {
            accepted_per_s: phase
                .speed
                .as_ref()
                .map_or(0.0, |speed| speed.accepted_per_s),
            crowded,
            phase: self.findings.phases.len(),
        };
        self.conclude(phase, &judged)?;
        Ok(trial)
    }

    /// Keeps a phase that has been judged.
    ///
    /// # Errors
    ///
    /// A promise was broken: then the scenario is over.
    pub(crate) fn conclude(&mut self, phase: Phase, judged: &Judged) -> Result<()> {
        self.note(&phase.name, judged);
        self.findings.phases.push(phase);
        if judged.passed() {
            Ok(())
        } else {
            Err(Broken.into())
        }
    }

    /// Keeps what the verdict needs.
    fn note(&mut self, name: &str, judged: &Judged) {
        for mut checks in judged.checks.clone() {
            for check in &mut checks {
                if check.status == Status::Fail {
                    check.actual = format!("{} (in {name})", check.actual);
                }
            }
            self.checks.push(checks);
        }
        if let Some(history) = judged.histories.first() {
            self.findings.audit = history.audit.clone().ok();
            if let Some(frames) = &history.frames {
                self.findings.live = Some(live(frames));
            }
        }
    }

    /// The phase of a trial.
    pub(crate) fn phase(&self, trial: &Trial) -> &Phase {
        &self.findings.phases[trial.phase]
    }

    /// Bytes that Redis has allocated, if it is known where it is.
    pub(crate) async fn redis_memory(&self) -> Option<u64> {
        let endpoints = self.server.backstage.endpoints().ok()?;
        redis_info::used_memory(&endpoints.redis_url).await.ok()
    }

    /// Asks the stores for their versions.
    async fn versions(&mut self) {
        let Ok(endpoints) = self.server.backstage.endpoints() else {
            return;
        };
        let redis = redis_info::info(&endpoints.redis_url)
            .await
            .unwrap_or_default();
        self.begun.versions.redis = redis.get("redis_version").cloned();
        self.begun.versions.postgres = crate::witness::version(&self.server.backstage).await;
    }
}

/// What a crowd measured.
pub(crate) fn phase(name: &str, run: &SaleRun, crowded: &Crowded) -> Result<Phase> {
    let Wish { crowd, stock, .. } = &run.wish;
    let offered = Offered {
        name: name.to_owned(),
        arrivals: match crowd.arrivals {
            Arrivals::Burst => report::Arrivals::Burst,
            Arrivals::Rate(per_s) => report::Arrivals::Rate { per_s },
        },
        connections: run.connections,
        connections_wanted: run.connections_wanted,
        stock: (crowd.sales == 1).then_some((*stock, crowd.quantity)),
    };
    let generator = Generator::new(crowded.cpu, crowded.wall, run.wish.threads);
    let mut phase = Phase::of(offered, &crowded.records, generator)?;
    phase.generator.late = crowded.late as u64;
    Ok(phase)
}

/// What each process used: until the last answer, and those that store until all was stored.
pub(crate) fn processes(phase: &mut Phase, crowded: &Crowded, settled: &Look) {
    let (Some((_, first)), Some((_, last))) = (crowded.looks.first(), crowded.looks.last()) else {
        return;
    };
    for (family, before) in first {
        let end = match family {
            Family::Writer | Family::Postgres => settled,
            _ => last,
        };
        let Some(after) = end.get(family) else {
            continue;
        };
        let used = |usage: &Usage| usage.cpu.saturating_sub(before.cpu);
        let rss = Some(after.rss_bytes);
        let mut process = Process::new(family.name(), used(after), rss, &phase.outcomes);
        process.samples = crowded
            .looks
            .iter()
            .filter_map(|(instant, look)| {
                let usage = look.get(family)?;
                Some(Sample {
                    at_ms: ms(*instant),
                    cpu_ms: ms(used(usage)),
                    rss_bytes: usage.rss_bytes,
                })
            })
            .collect();
        phase.processes.push(process);
    }
}

/// What a subscriber saw.
pub(crate) fn live(frames: &[Frame]) -> Live {
    let remaining = |frame: Option<&Frame>| Some(frame?.stock.as_ref().ok()?.remaining);
    Live {
        frames: frames.len(),
        first_remaining: remaining(frames.first()),
        last_remaining: remaining(frames.last()),
    }
}

/// The value in the middle; of none, nothing.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        Some(value) if values.len() % 2 == 1 => *value,
        Some(value) => f64::midpoint(values[middle - 1], *value),
        None => 0.0,
    }
}

/// How many requests fill so much time at a rate.
pub(crate) fn requests(rate: f64, time: Duration) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of requests"
    )]
    let requests = (rate * time.as_secs_f64()).max(1.0) as usize;
    requests
}
