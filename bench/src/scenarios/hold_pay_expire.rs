//! Buyers have seconds to pay. A third never does, some pay too late, some change their minds; what
//! comes back is bought by others, until exactly the stock is sold and everybody knows how they stand.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Deserialize;
use tokio::time::sleep;
use tokio::try_join;
use uuid::Uuid;

use crate::load::crowd::{Arrival, Arrivals, Crowd};
use crate::load::outcome::{self, Answer, Next, Outcome, Setback};
use crate::load::sender::{Load, Pool, Record, Requests, Sending};
use crate::load::tokens::{Role, Signer};
use crate::operator::{self, Hold, Operator, Terms};
use crate::report::{self, Figure, Generator, Goal, Offered, Percentiles, Phase, Run};
use crate::sale_run::{Judged, Server, sample};
use crate::trial::{self, Bench, Common};
use crate::verdict::holds::{self, Act, Again, Bought, HeldOrder, Holds, Told, What};
use crate::{clock, host, witness};

/// Connections of a crowd.
const CONNECTIONS: usize = 512;

/// Connections of those who pay late or cancel.
const FEW: usize = 64;

/// Units of the sale that is only for warming up.
const WARM_UP: u64 = 1000;

/// Around the deadline: from so long before it to so long after it some pay.
const BEFORE: TimeDelta = TimeDelta::milliseconds(150);
const AROUND: Duration = Duration::from_millis(500);

/// Behind the last deadline others still come.
const BEHIND: Duration = Duration::from_millis(500);

/// Of those who have an order: who never pays, who pays around the deadline, who cancels. The others
/// pay at once.
const NEVER: f64 = 1.0 / 3.0;
const LATE: f64 = 0.1;
const CANCEL: f64 = 0.1;

/// How often those who pay at once come for what is left.
const LAST_CROWDS: usize = 20;

/// How long a buyer tries again, and holds may take to end and to be stored.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Accepted purchases that are sent again when all is over.
const REPLAYS: usize = 200;

/// A payment that waits for the bank is looked at again so much later.
const THINKS: Duration = Duration::from_millis(100);

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Units for sale; fewer where so many cannot be bought and paid while the first are held.
    #[arg(long, default_value_t = 20_000)]
    pub(crate) stock: u64,
    /// How long an order waits for its payment.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) hold_seconds: u64,
    /// Crowds of which a third never pays, before those come who pay at once.
    #[arg(long, default_value_t = 3)]
    pub(crate) crowds: usize,
    /// Who takes the money.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) payment: Payment,
    /// A small stock and two crowds: for its verdict, not for its speed.
    #[arg(long)]
    pub(crate) short: bool,
}

/// Who takes the money.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Payment {
    /// Nobody: to pay is to confirm.
    #[default]
    None,
    /// The bank that the server has for tests: money is reserved, the order confirmed, money taken.
    Sandbox,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("hold-pay-expire", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    let most = if args.short {
        args.stock.min(1000)
    } else {
        args.stock
    };
    let stock = most.min(affordable(bench, args).await?).max(1);
    let crowds = if args.short { 2 } else { args.crowds };
    bench.set("stock", stock);
    bench.set("hold_seconds", args.hold_seconds);
    bench.set("crowds", crowds);
    bench.set("payment", format!("{:?}", args.payment).to_lowercase());
    let mut stand = Stand::open(bench, args, stock).await?;

    // Half as many again as there are units.
    let first = bench.crowd(usize::try_from(stock + stock / 2)?, Arrivals::Burst);
    let posted = stand.send(first).await?;
    let mut held = stand.bought("crowd", posted)?;
    for _ in 1..crowds {
        // While they pay, or do not, others come: as many as hold something, twice as many as
        // what comes back, until all of it is back.
        let last = held.iter().map(|order| order.until).max();
        let span = until(last.unwrap_or_default()) + BEHIND;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let rate = held.len().max(1) as f64 / span.as_secs_f64();
        let next = bench.crowd(held.len().max(1), Arrivals::Rate(rate));
        let deeds = stand.deeds(&held, false);
        let (acted, posted) = try_join!(stand.act(&deeds), stand.send(next))?;
        stand.acted(&deeds, acted)?;
        held = stand.bought("crowd while units come back", posted)?;
    }
    // What is left is for people who pay at once.
    for n in 0..LAST_CROWDS {
        let deeds = stand.deeds(&held, n > 0);
        let acted = stand.act(&deeds).await?;
        stand.acted(&deeds, acted)?;
        let left = stand.left().await?;
        if left == 0 {
            break;
        }
        let last = bench.crowd(usize::try_from(left)?, Arrivals::Burst);
        let posted = stand.send(last).await?;
        held = stand.bought("last crowd", posted)?;
    }
    stand.judge(bench).await
}

/// Units that a crowd can buy and pay before the first hold ends: at most those that it buys in a part
/// of the hold. A small crowd at a sale of its own says how fast that is, and warms everything up.
async fn affordable(bench: &mut Bench, args: &Args) -> Result<u64> {
    let stand = Stand::open(bench, args, WARM_UP).await?;
    let crowd = bench.crowd(usize::try_from(WARM_UP)?, Arrivals::Burst);
    let records = stand.send(crowd).await?.posted.records;
    let last = records.iter().map(|record| record.finished).max();
    let part = match args.payment {
        Payment::None => stand.hold / 4,
        // Several steps, each of which PostgreSQL has to keep.
        Payment::Sandbox => stand.hold / 50,
    };
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let rate = WARM_UP as f64 / last.unwrap_or_default().as_secs_f64().max(1e-3);
    Ok(trial::requests(rate, part) as u64)
}

/// From now until an instant.
fn until(instant: DateTime<Utc>) -> Duration {
    (instant - clock::now()).to_std().unwrap_or_default()
}

/// An order that its buyer has to decide about.
struct Held {
    order: Uuid,
    bearer: String,
    until: DateTime<Utc>,
}

/// What a buyer is going to do with an order.
#[derive(Clone)]
struct Deed {
    order: Uuid,
    bearer: String,
    /// From now.
    due: Duration,
}

/// What buyers are going to do with their orders; those who are in none of these never pay.
#[derive(Default)]
struct Deeds {
    pay: Vec<Deed>,
    /// Around the deadline: before it or behind it.
    pay_late: Vec<Deed>,
    cancel: Vec<Deed>,
}

/// What became of many requests.
struct Posted {
    requests: Arc<Requests>,
    plan: Vec<Arrival>,
    records: Vec<Record>,
    arrivals: report::Arrivals,
    /// The instant from which records count.
    from: DateTime<Utc>,
    connections: (usize, usize),
    generator: Generator,
}

/// A crowd, and what became of it.
struct Came {
    ids: Vec<Uuid>,
    bearers: Vec<String>,
    posted: Posted,
}

/// Purchases of a crowd that were accepted, with their 201s.
struct Sample {
    requests: Arc<Requests>,
    accepted: Vec<(Arrival, Bytes)>,
}

/// The sale, and everything that was seen of it so far.
struct Stand {
    server: Server,
    operator: Operator,
    signer: Signer,
    sale: Uuid,
    allocation: u64,
    hold: Duration,
    /// The body of a payment.
    pay: &'static str,
    random: StdRng,
    threads: usize,
    bought: Vec<Bought>,
    unknown: HashSet<Uuid>,
    acts: Vec<Act>,
    /// Of each crowd some purchases that were accepted, to be sent again.
    samples: Vec<Sample>,
    /// One of each kind.
    phases: Vec<Phase>,
    accepted: Vec<Duration>,
    paid: Vec<Duration>,
}

impl Stand {
    /// Makes the sale.
    async fn open(bench: &mut Bench, args: &Args, allocation: u64) -> Result<Self> {
        let server = bench.server.clone();
        operator::reach(&server.target).await?;
        let signer = Signer::new(&server.backstage.secret()?, clock::now());
        let run = Uuid::from_u128(rand::random());
        let operator = Operator {
            target: server.target.clone(),
            bearer: signer.bearer(run, Role::Operator)?,
            patience: PATIENCE,
        };
        let name = "Hold, pay, expire";
        let product = operator.create_product(name, &run.to_string()).await?;
        let (payment, pay) = match args.payment {
            Payment::None => ("none", "{}"),
            Payment::Sandbox => ("sandbox", r#"{"payment_method":"sandbox_ok"}"#),
        };
        let terms = Terms {
            name: name.to_owned(),
            allocation,
            per_buyer_limit: 1,
            opens_at: clock::now().duration_trunc(TimeDelta::milliseconds(1))?,
            hold: Some(Hold {
                seconds: args.hold_seconds,
                payment,
            }),
        };
        let key = run.to_string();
        let sale = operator.create_sale(product, &terms, &key).await?;
        Ok(Self {
            sale: sale.id,
            server,
            operator,
            signer,
            allocation,
            hold: Duration::from_secs(args.hold_seconds),
            pay,
            random: StdRng::seed_from_u64(bench.crowd(0, Arrivals::Burst).seed),
            threads: bench.threads(),
            bought: Vec::new(),
            unknown: HashSet::new(),
            acts: Vec::new(),
            samples: Vec::new(),
            phases: Vec::new(),
            accepted: Vec::new(),
            paid: Vec::new(),
        })
    }

    /// Lets a crowd buy.
    async fn send(&self, crowd: Crowd) -> Result<Came> {
        let ids = crowd.ids();
        let bearers = self.signer.buyers(&ids)?;
        let path = format!("/v1/sales/{}/orders", self.sale);
        let keys = Uuid::from_u128(rand::random()).to_string();
        let body = r#"{"quantity":1}"#;
        let requests = Requests::new(&self.server.target, [path], bearers.clone(), keys, body);
        let arrivals = match crowd.arrivals {
            Arrivals::Burst => report::Arrivals::Burst,
            Arrivals::Rate(per_s) => report::Arrivals::Rate { per_s },
        };
        let posted = self.post(
            Arc::new(requests),
            crowd.plan(),
            CONNECTIONS,
            outcome::judge,
        );
        let posted = Posted {
            arrivals,
            ..posted.await?
        };
        Ok(Came {
            ids,
            bearers,
            posted,
        })
    }

    /// Lets buyers do what they are going to.
    async fn act(&self, deeds: &Deeds) -> Result<[Posted; 3]> {
        let (pay, pay_late, cancel) = try_join!(
            self.on_orders(&deeds.pay, "pay", self.pay, CONNECTIONS),
            self.on_orders(&deeds.pay_late, "pay", self.pay, FEW),
            self.on_orders(&deeds.cancel, "cancel", "{}", FEW),
        )?;
        Ok([pay, pay_late, cancel])
    }

    async fn on_orders(
        &self,
        deeds: &[Deed],
        verb: &str,
        body: &str,
        connections: usize,
    ) -> Result<Posted> {
        let paths = deeds
            .iter()
            .map(|deed| format!("/v1/orders/{}/{verb}", deed.order));
        let bearers = deeds.iter().map(|deed| deed.bearer.clone()).collect();
        let keys = Uuid::from_u128(rand::random()).to_string();
        let requests = Requests::new(&self.server.target, paths, bearers, keys, body);
        let plan = deeds.iter().enumerate().map(|(n, deed)| Arrival {
            buyer: n,
            key: n,
            sale: n,
            due: deed.due,
        });
        self.post(Arc::new(requests), plan.collect(), connections, judge)
            .await
    }

    async fn post(
        &self,
        requests: Arc<Requests>,
        plan: Vec<Arrival>,
        connections: usize,
        judge: fn(Answer, Option<Duration>) -> Next,
    ) -> Result<Posted> {
        let load = Load {
            target: self.server.target.clone(),
            connections: connections.min(plan.len()).max(self.threads),
            threads: self.threads,
            timeout: Duration::from_secs(10),
            patience: PATIENCE,
            cuts_every: None,
            seed: 0,
        };
        let pool = Pool::open(&load).await?;
        let (opened, cpu) = (pool.opened, host::cpu_time());
        let (opening, from) = (Instant::now(), clock::now());
        let sending = Sending {
            requests: Arc::clone(&requests),
            plan: plan.clone(),
            judge,
            opening,
        };
        let sent = pool.run(Arc::new(sending), Arc::default()).await?;
        let cpu = host::cpu_time().saturating_sub(cpu);
        let mut generator = Generator::new(cpu, opening.elapsed(), self.threads);
        generator.late = sent.late as u64;
        Ok(Posted {
            requests,
            plan,
            records: sent.records,
            arrivals: report::Arrivals::Burst,
            from,
            connections: (opened, load.connections),
            generator,
        })
    }

    /// Keeps what a crowd was told.
    fn bought(&mut self, name: &str, came: Came) -> Result<Vec<Held>> {
        let mut held = Vec::new();
        let Came {
            ids,
            bearers,
            posted,
        } = came;
        for record in &posted.records {
            let buyer = posted.plan[record.purchase].buyer;
            match &record.outcome {
                Outcome::Accepted { body, .. } => {
                    self.accepted
                        .push(record.finished.saturating_sub(record.due));
                    let order = serde_json::from_slice::<HeldOrder>(body);
                    if let Ok(HeldOrder {
                        id,
                        held_until: Some(until),
                        ..
                    }) = &order
                    {
                        held.push(Held {
                            order: *id,
                            bearer: bearers[buyer].clone(),
                            until: *until,
                        });
                    }
                    self.bought.push(Bought {
                        buyer: ids[buyer],
                        order: order.map_err(|error| error.to_string()),
                    });
                }
                Outcome::Unknown { .. } => {
                    self.unknown.insert(ids[buyer]);
                }
                Outcome::Refused { .. } | Outcome::Failed { .. } => {}
            }
        }
        let sample = sample(&posted.records, REPLAYS).into_iter();
        let sample = sample.map(|(purchase, body)| (posted.plan[purchase], body));
        self.samples.push(Sample {
            requests: Arc::clone(&posted.requests),
            accepted: sample.collect(),
        });
        self.phase(name, &posted)?;
        Ok(held)
    }

    /// What buyers are going to do: a third of them nothing, unless everybody pays at once.
    fn deeds(&mut self, held: &[Held], faithful: bool) -> Deeds {
        let mut deeds = Deeds::default();
        for Held {
            order,
            bearer,
            until: deadline,
        } in held
        {
            let around = until(*deadline - BEFORE) + AROUND.mul_f64(self.random.random());
            let fate = if faithful {
                1.0
            } else {
                self.random.random::<f64>()
            };
            let (list, due) = if fate < NEVER {
                continue;
            } else if fate < NEVER + LATE {
                (&mut deeds.pay_late, around)
            } else if fate < NEVER + LATE + CANCEL / 2.0 {
                (&mut deeds.cancel, around)
            } else if fate < NEVER + LATE + CANCEL {
                (&mut deeds.cancel, Duration::ZERO)
            } else {
                (&mut deeds.pay, Duration::ZERO)
            };
            list.push(Deed {
                order: *order,
                bearer: bearer.clone(),
                due,
            });
        }
        for list in [&mut deeds.pay, &mut deeds.pay_late, &mut deeds.cancel] {
            list.sort_by_key(|deed| deed.due);
        }
        deeds
    }

    /// Keeps what buyers were told about their orders.
    fn acted(&mut self, deeds: &Deeds, [pay, pay_late, cancel]: [Posted; 3]) -> Result<()> {
        let accepted = |record: &&Record| matches!(record.outcome, Outcome::Accepted { .. });
        let paid = pay.records.iter().filter(accepted);
        let paid = paid.map(|record| record.finished.saturating_sub(record.due));
        self.paid.extend(paid);
        for (name, what, deeds, posted) in [
            ("payments", What::Pay, &deeds.pay, pay),
            (
                "payments around the deadline",
                What::Pay,
                &deeds.pay_late,
                pay_late,
            ),
            ("cancellations", What::Cancel, &deeds.cancel, cancel),
        ] {
            for record in &posted.records {
                self.acts.push(Act {
                    order: deeds[record.purchase].order,
                    what,
                    told: told(&record.outcome),
                    answered_at: posted.from + TimeDelta::from_std(record.finished)?,
                });
            }
            self.phase(name, &posted)?;
        }
        Ok(())
    }

    /// Keeps the first phase of each name.
    fn phase(&mut self, name: &str, posted: &Posted) -> Result<()> {
        let known = self.phases.iter().any(|phase| phase.name == name);
        if known || posted.records.is_empty() {
            return Ok(());
        }
        let (connections, connections_wanted) = posted.connections;
        let offered = Offered {
            name: name.to_owned(),
            arrivals: posted.arrivals,
            connections,
            connections_wanted,
            stock: None,
        };
        let phase = Phase::of(offered, &posted.records, posted.generator.clone())?;
        self.phases.push(phase);
        Ok(())
    }

    /// Units that are for sale once nothing is held any more.
    async fn left(&self) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let sale = self.operator.sale(self.sale).await?;
            if sale.held == 0 {
                return Ok(sale.remaining);
            }
            if begun.elapsed() > self.hold + PATIENCE {
                // That holds do not end is for the verdict.
                return Ok(0);
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until everything is stored, sends some purchases again, ends the sale, and judges.
    async fn judge(self, bench: &mut Bench) -> Result<()> {
        let after = self.operator.sale(self.sale).await;
        let begun = Instant::now();
        if let (Ok(after), Some(mut watch)) = (
            &after,
            witness::Watch::of(&self.server.backstage, &[self.sale]).await,
        ) {
            while watch.sold().await? != Some(after.sold) && begun.elapsed() < PATIENCE {
                sleep(LOOK_AGAIN).await;
            }
        }
        self.operator.close(self.sale).await?;
        let mut agains = Vec::new();
        for Sample { requests, accepted } in &self.samples {
            let plan = accepted.iter().map(|(arrival, _)| Arrival {
                due: Duration::ZERO,
                ..*arrival
            });
            let posted = self.post(Arc::clone(requests), plan.collect(), FEW, outcome::judge);
            let records = posted.await?.records.into_iter();
            agains.extend(records.zip(accepted).map(|(record, (_, first))| Again {
                first: first.clone(),
                again: again(record.outcome),
            }));
        }
        let line = |error: anyhow::Error| format!("{error:#}");
        let history = Holds {
            sale: self.sale,
            allocation: self.allocation,
            bought: self.bought,
            unknown: self.unknown,
            acts: self.acts,
            rows: witness::orders(&self.server.backstage, self.sale)
                .await
                .map_err(line),
            ends: witness::ends(&self.server.backstage, self.sale)
                .await
                .map_err(line),
            leaderboard: self.operator.leaderboard(self.sale).await.map_err(line),
            after: after.map_err(line),
            agains,
            audit: self.operator.audit(self.sale).await.map_err(line),
        };
        figures(bench, &history, &self.phases, self.accepted, self.paid)?;
        bench.findings.audit = history.audit.clone().ok();
        let checks = vec![holds::check(&history)];
        let mut phases = self.phases;
        let last = phases.pop();
        bench.findings.phases.extend(phases);
        let judged = Judged {
            checks,
            histories: Vec::new(),
        };
        match last {
            Some(last) => bench.conclude(last, &judged),
            None => anyhow::bail!("nobody came"),
        }
    }
}

/// What an answer about an order means: the bank may think first.
fn judge(answer: Answer, doubt: Option<Duration>) -> Next {
    match answer.status {
        200 => Next::Done(Outcome::Accepted {
            replayed: answer.replayed,
            body: answer.body,
        }),
        202 => Next::Again {
            setback: Setback::Refused("pending".to_owned()),
            doubtful: true,
            wait: THINKS,
        },
        _ => outcome::judge(answer, doubt),
    }
}

/// What a buyer was told about an order.
fn told(outcome: &Outcome) -> Told {
    #[derive(Deserialize)]
    struct View {
        status: String,
    }
    match outcome {
        Outcome::Accepted { body, .. } => Told::Done(match serde_json::from_slice::<View>(body) {
            Ok(view) => view.status,
            Err(error) => error.to_string(),
        }),
        Outcome::Refused { code } => Told::Refused(code.clone()),
        Outcome::Failed { reason } | Outcome::Unknown { reason } => Told::Nothing(reason.clone()),
    }
}

/// What a purchase got that was sent again.
fn again(outcome: Outcome) -> Result<Bytes, String> {
    match outcome {
        Outcome::Accepted {
            replayed: true,
            body,
        } => Ok(body),
        Outcome::Accepted { .. } => Err("a 201 as if it were new".to_owned()),
        Outcome::Refused { code: reason }
        | Outcome::Failed { reason }
        | Outcome::Unknown { reason } => Err(reason),
    }
}

/// The numbers to quote.
fn figures(
    bench: &mut Bench,
    history: &Holds,
    phases: &[Phase],
    accepted: Vec<Duration>,
    paid: Vec<Duration>,
) -> Result<()> {
    for (name, phase) in [("accepted_per_s", "crowd"), ("paid_per_s", "payments")] {
        let phase = phases.iter().find(|one| one.name == phase);
        if let Some(speed) = phase.and_then(|phase| phase.speed.as_ref()) {
            bench.figure(Figure::new(name, speed.accepted_per_s, "/s"));
        }
    }
    for (name, durations) in [("accepted", accepted), ("paid", paid)] {
        let times = Percentiles::of(durations.into_iter())?;
        bench.figure(Figure::new(format!("{name}_p50_ms"), times.p50, "ms"));
        bench.figure(Figure::new(format!("{name}_p99_ms"), times.p99, "ms"));
    }
    let late = history.lateness().into_iter();
    let late = Percentiles::of(late.filter_map(|late| late.to_std().ok()))?;
    let most = Figure::new("expired_late_max_ms", late.max, "ms");
    bench.figure(Figure::new("expired_late_p50_ms", late.p50, "ms"));
    bench.figure(Figure::new("expired_late_p99_ms", late.p99, "ms"));
    bench.figure(most.with_goal(Goal::at_most(1000.0)));
    let rows = || history.rows.iter().flatten();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let count = |status: &str| rows().filter(|row| row.status == status).count() as f64;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let orders = rows().count() as f64;
    bench.figure(Figure::new("orders", orders, ""));
    for status in ["confirmed", "expired", "cancelled"] {
        bench.figure(Figure::new(format!("orders_{status}"), count(status), ""));
    }
    let conversion = count("confirmed") / orders.max(1.0);
    bench.figure(Figure::new("conversion", conversion, ""));
    Ok(())
}
