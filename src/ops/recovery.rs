//! Looks at a fenced partition, and lets it sell again when nothing can be missing: as it is, or
//! made anew from PostgreSQL and the journal.
//!
//! The epoch is raised in PostgreSQL first, so that no writer stores anything of an older
//! timeline; then Redis' meta is written, if Redis is still exactly as it was inspected.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    domain::{
        id::{Epoch, Fingerprint, JournalId, Partition, RoundId, SaleNumber},
        limits::CLOCK_JUMP_MS,
        model::Model,
        order::Status,
        round::{Counters, Intent, Terms},
    },
    engine::{Engine, Engines, Fence, Inspection, SaleImage},
    faults,
    store::{
        Database, StoreError,
        audit::Snapshot,
        floors::Floors,
        journal::{Position, Positions},
        orders::Place,
        rounds::Rounds,
    },
};

/// The time between two looks at a partition that stays fenced.
const PERIOD: Duration = Duration::from_millis(250);

/// The time between two reports of how far this node has seen.
const REPORT: Duration = Duration::from_secs(1);

/// A node that has said nothing for so long is dead.
const DEAD: Duration = Duration::from_secs(10);

/// The least time between two rebuilds that a damaged round asks for.
const DAMAGE: Duration = Duration::from_secs(2);

/// Orders of a page.
const PAGE: i64 = 5_000;

/// Verifies partitions whenever they are fenced.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The engines of all partitions.
    pub engines: Engines,
    /// Where the epochs live.
    pub positions: Positions,
    /// Which rounds Redis must have.
    pub rounds: Rounds,
    /// How far each node has seen.
    pub floors: Floors,
    /// What Redis is made anew from.
    pub database: Database,
    /// This process.
    pub node: Uuid,
}

/// What came of looking at a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// Another node, or an earlier run of this one, has begun the epoch on this very server.
    Adopted,
    /// Everything matched, and a new epoch has begun.
    Begun(JournalId),
    /// So many sales were made anew, and a new epoch has begun.
    Rebuilt(JournalId, usize),
}

/// Why a partition stays fenced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StaysFenced {
    /// A store does not answer, or the partition changed meanwhile: the next look may do.
    #[error("{0}")]
    Passing(String),
    /// Something is missing, or may be: a human has to look.
    #[error("{0}")]
    Lost(String),
}

impl Recovery {
    /// Watches every partition until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let recovery = Arc::new(self);
        let watches = (0..recovery.engines.all().len()).map(|index| {
            let recovery = Arc::clone(&recovery);
            let stop = stop.clone();
            async move {
                if let Some(engine) = recovery.engines.all().get(index) {
                    stop.run_until_cancelled(recovery.watch(engine)).await;
                    // The last word of this node: it sells no more. What cannot be said now was
                    // said a second ago, and then nothing is rebuilt without a human.
                    let _ = recovery.report(engine, true).await;
                }
            }
        });
        futures::future::join_all(watches).await;
    }

    async fn watch(&self, engine: &Engine) {
        let partition = engine.partition();
        let mut fence = engine.fence();
        let mut told = None;
        let mut mended: Option<Instant> = None;
        loop {
            let fenced = tokio::time::timeout(
                REPORT,
                fence.wait_for(|fence| matches!(fence, Fence::Fenced(_))),
            );
            match fenced.await.map(|changed| changed.is_ok()) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => {
                    // How far this node has seen is worth saying again and again; that it cannot
                    // be said does not stop the sale.
                    if let Err(error) = self.report(engine, false).await {
                        tracing::debug!(%partition, %error, "how far this node has seen is not noted");
                    } else if let Err(error) = self.bury(engine).await {
                        tracing::debug!(%partition, %error, "nodes that are gone are not forgotten");
                    }
                    self.compare(engine).await;
                    let due = mended.is_none_or(|at| at.elapsed() >= DAMAGE);
                    if due && engine.is_damaged() {
                        mended = Some(Instant::now());
                        engine.fence_again("a round is damaged");
                    }
                    continue;
                }
            }
            match self.verify(engine).await {
                Ok(Verified::Adopted) => {
                    told = None;
                    tracing::info!(%partition, "partition verified: it sells");
                }
                Ok(Verified::Rebuilt(entry, sales)) => {
                    told = None;
                    tracing::warn!(
                        %partition,
                        %entry,
                        sales,
                        "partition made anew from PostgreSQL and the journal: it sells"
                    );
                }
                Ok(Verified::Begun(entry)) => {
                    told = None;
                    tracing::info!(%partition, %entry, "partition verified: a new epoch begins");
                }
                Err(reason) => {
                    // Once for each reason: this goes on for as long as it takes.
                    if told.as_ref() != Some(&reason) {
                        match &reason {
                            StaysFenced::Passing(_) => {
                                tracing::warn!(%partition, %reason, "partition stays fenced");
                            }
                            StaysFenced::Lost(_) => tracing::error!(
                                %partition,
                                %reason,
                                "partition stays fenced: Redis may have lost accepted orders"
                            ),
                        }
                        told = Some(reason);
                    }
                }
            }
            // Also after a success, so that a fence that closes again at once does not spin.
            sleep(PERIOD).await;
        }
    }

    /// Looks at one partition; lets it sell if nothing can be missing.
    ///
    /// # Errors
    /// [`StaysFenced`].
    pub async fn verify(&self, engine: &Engine) -> Result<Verified, StaysFenced> {
        let passing = |error: &dyn std::fmt::Display| StaysFenced::Passing(error.to_string());
        let partition = engine.partition();
        let position = self
            .positions
            .of(partition)
            .await
            .map_err(|error| passing(&error))?;
        let inspection = engine.inspect().await.map_err(|error| passing(&error))?;
        let estimate_ms = engine.redis_ms();
        // Within one run of the server time stands still until a clock that was set back has caught
        // up. A server that comes with another clock is believed neither ahead nor behind.
        let clock_ms = if inspection.same_incarnation {
            inspection.now_ms
        } else {
            inspection.clock_ms
        };
        if let Some(ahead_ms) = estimate_ms.map(|estimate| clock_ms - estimate)
            && ahead_ms.abs() > CLOCK_JUMP_MS
        {
            // In words that do not change from look to look, so that they are said once.
            let direction = if ahead_ms > 0 { "ahead" } else { "back" };
            return Err(StaysFenced::Lost(format!(
                "the clock of Redis jumped {direction} by more than {} s; if it is right now, \
                 restart this node",
                CLOCK_JUMP_MS / 1000
            )));
        }
        // A new server may have other settings, and acceptances say what they survive.
        engine
            .read_settings()
            .await
            .map_err(|error| passing(&error))?;
        let provisioned = self
            .rounds
            .provisioned(partition)
            .await
            .map_err(|error| passing(&error))?;
        // A later timeline was begun with proof; what an older one had reached is settled.
        let present = inspection.epoch.unwrap_or(position.installed);
        let nodes = self
            .floors
            .of(partition)
            .await
            .map_err(|error| passing(&error))?;
        let floor = nodes
            .iter()
            .map(|node| node.floor)
            .chain([engine.floor()])
            .filter(|floor| floor.epoch >= present)
            .map(|floor| floor.pseq)
            .max()
            .unwrap_or(0);
        let lost = matches(&inspection, &position, floor, &provisioned).err();
        let incomplete = engine
            .incomplete(&inspection, &provisioned)
            .await
            .map_err(|error| passing(&error))?;
        if let Some(reason) = lost {
            let sales = provisioned.iter().map(|round| round.sale).collect();
            return self
                .rebuild(engine, &inspection, &position, sales, &reason)
                .await;
        }
        if let Some(first) = incomplete.first() {
            let reason = format!(
                "{} of {} rounds are missing or not whole in Redis, the first is {first}",
                incomplete.len(),
                provisioned.len()
            );
            let sales = incomplete.iter().map(|round| round.sale).collect();
            return self
                .rebuild(engine, &inspection, &position, sales, &reason)
                .await;
        }
        if inspection.same_incarnation && inspection.epoch == Some(position.epoch) {
            engine.adopt(position.epoch, &inspection);
            return Ok(Verified::Adopted);
        }
        let mut present = position.epoch;
        // Beyond every epoch that there was, also those that PostgreSQL has forgotten.
        while present <= inspection.epoch.unwrap_or_default().max(position.epoch) {
            present = self
                .positions
                .raise_epoch(partition, present, inspection.pseq)
                .await
                .map_err(|error| passing(&error))?
                .ok_or_else(|| StaysFenced::Passing("another node is at work".to_owned()))?
                .epoch;
        }
        faults::point("recovery.after_raise");
        let entry = self.install(engine, present, &inspection).await?;
        Ok(Verified::Begun(entry))
    }

    /// Writes the epoch into Redis, and notes that it is there.
    async fn install(
        &self,
        engine: &Engine,
        epoch: Epoch,
        inspection: &Inspection,
    ) -> Result<JournalId, StaysFenced> {
        let partition = engine.partition();
        let entry = engine
            .install(epoch, inspection)
            .await
            .map_err(|error| StaysFenced::Passing(error.to_string()))?;
        faults::point("recovery.after_install");
        match self.positions.set_installed(partition, epoch).await {
            Ok(true) => {}
            // Another node has raised the epoch meanwhile: nobody would store what is sold in ours.
            Ok(false) => {
                engine.fence_again("another epoch has begun");
                return Err(StaysFenced::Passing("another epoch has begun".to_owned()));
            }
            // Not noted: the next look only knows less, never something wrong.
            Err(error) => {
                tracing::warn!(%partition, %error, "the new epoch could not be noted as installed");
            }
        }
        Ok(entry)
    }

    /// Stops a sale that PostgreSQL does not store any more, because it has forgotten the epoch: a
    /// standby that was behind has taken over.
    async fn compare(&self, engine: &Engine) {
        let position = self.positions.of(engine.partition()).await;
        if position.is_ok_and(|position| position.epoch < engine.floor().epoch) {
            engine.fence_again("PostgreSQL has forgotten this epoch");
        }
    }

    /// Says how far this node has seen.
    async fn report(&self, engine: &Engine, last_word: bool) -> Result<(), StaysFenced> {
        let floor = engine.floor();
        if floor.epoch.0 == 0 {
            return Ok(());
        }
        self.floors
            .report(engine.partition(), self.node, floor, last_word)
            .await
            .map_err(|error| StaysFenced::Passing(error.to_string()))
    }

    /// Takes over what nodes that are gone may have seen: Redis, asked now, is as far as any of
    /// them ever saw it in this epoch.
    async fn bury(&self, engine: &Engine) -> Result<(), StaysFenced> {
        let passing = |error: &dyn std::fmt::Display| StaysFenced::Passing(error.to_string());
        let partition = engine.partition();
        let nodes = self
            .floors
            .of(partition)
            .await
            .map_err(|error| passing(&error))?;
        let gone: Vec<_> = nodes
            .iter()
            .filter(|node| node.node != self.node && node.age > 3 * DEAD)
            .map(|node| node.node)
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        let inspection = engine.inspect().await.map_err(|error| passing(&error))?;
        if !inspection.same_incarnation || inspection.epoch != Some(engine.floor().epoch) {
            return Ok(());
        }
        engine.adopt(engine.floor().epoch, &inspection);
        self.report(engine, false).await?;
        self.floors
            .forget(partition, gone)
            .await
            .map_err(|error| passing(&error))
    }

    /// Makes sales anew that are not whole, if PostgreSQL and the journal have everything that was
    /// ever acknowledged.
    async fn rebuild(
        &self,
        engine: &Engine,
        inspection: &Inspection,
        position: &Position,
        sales: BTreeSet<SaleNumber>,
        reason: &str,
    ) -> Result<Verified, StaysFenced> {
        let passing = |error: &dyn std::fmt::Display| StaysFenced::Passing(error.to_string());
        let partition = engine.partition();
        self.report(engine, true).await?;
        let survives = Survives::of(inspection, position);
        self.proven(engine, inspection, position, &survives, reason)
            .await?;

        let raised = self
            .positions
            .raise_epoch(partition, position.epoch, survives.end)
            .await
            .map_err(|error| passing(&error))?
            .ok_or_else(|| StaysFenced::Passing("another node is at work".to_owned()))?;
        let (model, entries) = self
            .image(engine, partition, raised.stored, &survives)
            .await?;
        if model.pseq != survives.end {
            return Err(StaysFenced::Passing(
                "the journal moved while it was read".to_owned(),
            ));
        }
        engine
            .begin_rebuild(raised.epoch, inspection, survives.end, survives.journal)
            .await
            .map_err(|error| passing(&error))?;
        // Whoever had begun before us may have left anything behind.
        let all = inspection.epoch.is_none();
        let mut rebuilt = 0;
        for (number, sale) in &model.sales {
            if !all && !sales.contains(number) {
                continue;
            }
            let rounds = model
                .rounds
                .iter()
                .filter(|(id, _)| id.sale == *number)
                .filter_map(|(id, round)| Some((*id, (round, *entries.get(id)?))))
                .collect();
            let image = SaleImage {
                number: *number,
                sale,
                rounds,
            };
            engine
                .load(raised.epoch, &image)
                .await
                .map_err(|error| passing(&error))?;
            rebuilt += 1;
        }
        let rounds: Vec<_> = model.rounds.keys().copied().collect();
        let inspection = engine.inspect().await.map_err(|error| passing(&error))?;
        let incomplete = engine
            .incomplete(&inspection, &rounds)
            .await
            .map_err(|error| passing(&error))?;
        if let Some(first) = incomplete.first() {
            return Err(StaysFenced::Passing(format!(
                "round {first} is not whole after it was made anew"
            )));
        }
        let entry = self.install(engine, raised.epoch, &inspection).await?;
        engine.forget_damage();
        Ok(Verified::Rebuilt(entry, rebuilt))
    }

    /// Whether everything that a buyer may have been told survives.
    ///
    /// # Errors
    /// [`StaysFenced`] that says what is missing, or who has to be waited for.
    async fn proven(
        &self,
        engine: &Engine,
        inspection: &Inspection,
        position: &Position,
        survives: &Survives,
        reason: &str,
    ) -> Result<(), StaysFenced> {
        let own = engine.floor();
        let nodes = self
            .floors
            .of(engine.partition())
            .await
            .map_err(|error| StaysFenced::Passing(error.to_string()))?;
        // An epoch that was raised and never installed sold nothing.
        let sold_in = position.installed;
        // What Redis itself counted, if it still knows.
        let mut seen = if inspection.epoch.is_some() {
            inspection.pseq
        } else {
            0
        };
        if own.epoch >= sold_in {
            seen = seen.max(own.pseq);
        }
        let mut dead = 0;
        for other in nodes
            .iter()
            .filter(|other| other.node != self.node && other.floor.epoch >= sold_in)
        {
            seen = seen.max(other.floor.pseq);
            if other.last_word {
                continue;
            }
            if other.age < DEAD {
                return Err(StaysFenced::Passing(
                    "another node has not said yet how far it has seen".to_owned(),
                ));
            }
            dead += 1;
        }
        if seen > survives.end && !faults::bug("rebuild_without_floor") {
            return Err(StaysFenced::Lost(format!(
                "{reason}; entries {} to {seen} of the journal were acknowledged, and neither \
                 PostgreSQL nor the journal has them",
                survives.end + 1
            )));
        }
        // A journal that goes to the end that Redis itself counted has everything.
        let journal_says = survives.journal && inspection.epoch.is_some();
        let witnessed = own.epoch >= sold_in && own.epoch.0 > 0;
        let all_said = nodes
            .iter()
            .any(|node| node.floor.epoch >= sold_in && node.last_word);
        if journal_says || (dead == 0 && (witnessed || all_said)) {
            return Ok(());
        }
        Err(StaysFenced::Lost(format!(
            "{reason}; nobody who sold lives to say whether entries after {} were acknowledged",
            survives.end
        )))
    }

    /// What Redis must have, and the last entry that touched each round.
    async fn image(
        &self,
        engine: &Engine,
        partition: Partition,
        stored: JournalId,
        survives: &Survives,
    ) -> Result<(Model, BTreeMap<RoundId, JournalId>), StaysFenced> {
        let passing = |error: &dyn std::fmt::Display| StaysFenced::Passing(error.to_string());
        let database = self.database.clone();
        let read = self
            .database
            .run(async move |_| read_rows(&database, partition).await);
        let (mut model, mut entries, terms, at) = read.await.map_err(|error| match error {
            ReadError::Store(error) => StaysFenced::Passing(error.to_string()),
            ReadError::Contradiction(what) => StaysFenced::Lost(what),
        })?;
        if at != stored {
            return Err(StaysFenced::Passing("the writer moved on".to_owned()));
        }
        if survives.journal {
            for entry in engine.tail(stored).await.map_err(|error| passing(&error))? {
                if faults::bug("rebuild_forgets_tail") {
                    model.pseq = entry.id.pseq;
                    continue;
                }
                model.replay(&entry, &terms).ok_or_else(|| {
                    StaysFenced::Lost(format!(
                        "entry {} does not follow from PostgreSQL",
                        entry.id
                    ))
                })?;
                entries.extend(entry.rounds.iter().map(|(round, _)| (*round, entry.id)));
            }
        }
        Ok((model, entries))
    }
}

/// What there still is of the journal, in PostgreSQL and in Redis together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Survives {
    /// The number of the last entry.
    end: u64,
    /// Whether Redis has the journal from the position on; otherwise it begins anew.
    journal: bool,
}

impl Survives {
    fn of(redis: &Inspection, position: &Position) -> Self {
        let stored = position.stored;
        match (
            redis.journal_length,
            redis.journal_first,
            redis.journal_last,
        ) {
            (Some(length), Some(first), Some(last))
                if first.pseq <= stored.pseq + 1
                    && last >= stored
                    && last.epoch <= position.epoch
                    && length == last.pseq - first.pseq + 1 =>
            {
                Self {
                    end: last.pseq,
                    journal: true,
                }
            }
            _ => Self {
                end: stored.pseq,
                journal: false,
            },
        }
    }
}

/// Why the rows of PostgreSQL are no ground to build on.
enum ReadError {
    Store(StoreError),
    Contradiction(String),
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

type Rows = (
    Model,
    BTreeMap<RoundId, JournalId>,
    BTreeMap<RoundId, Terms>,
    JournalId,
);

/// Reads what PostgreSQL has of a partition, as of one instant, and checks it against its own
/// counters.
async fn read_rows(database: &Database, partition: Partition) -> Result<Rows, ReadError> {
    let mut snapshot = Snapshot::take(database).await?;
    let (epoch, stored) = snapshot.position(partition).await?;
    let rounds = snapshot.rounds_of(partition).await?;
    let terms = rounds
        .iter()
        .map(|(id, round)| (*id, round.terms))
        .collect();
    let mut model = Model {
        epoch,
        pseq: stored.pseq,
        ..Model::default()
    };
    let mut entries = BTreeMap::new();
    let archived = snapshot.archived(partition).await?;
    for (id, stored) in rounds.iter().filter(|(_, round)| round.provisioned) {
        entries.insert(*id, stored.entry);
        if stored.intent == Intent::Archived {
            let left = archived.get(id).copied().unwrap_or_default();
            let sold = left.sold.saturating_add_signed(stored.dead_units);
            check(*id, &stored.counters, sold, 0)?;
            model.restore_archived(*id, stored.terms, stored.counters, left.orders);
            continue;
        }
        let mut orders = Vec::new();
        let mut after = Place::default();
        loop {
            let page = snapshot.orders(*id, after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Place {
                epoch: last.epoch,
                seq: last.seq,
            };
            orders.extend(page);
        }
        let units = |status: Status| -> u64 {
            orders
                .iter()
                .filter(|order| order.status == status)
                .map(|order| order.quantity)
                .sum()
        };
        let sold = units(Status::Confirmed).saturating_add_signed(stored.dead_units);
        let held = units(Status::Held);
        check(*id, &stored.counters, sold, held)?;
        model.restore(*id, stored.terms, stored.intent, stored.counters, orders);
    }
    for operation in snapshot.operations(partition).await? {
        if faults::bug("rebuild_forgets_operations") {
            break;
        }
        if let Some(sale) = model.sales.get_mut(&operation.sale) {
            let asked = Fingerprint::restock(operation.units);
            sale.operations
                .insert(operation.operation, (asked, operation.seq));
        }
    }
    Ok((model, entries, terms, stored))
}

/// Whether the orders of a round make what its counters say.
fn check(id: RoundId, counters: &Counters, sold: u64, held: u64) -> Result<(), ReadError> {
    if (sold, held) == (counters.sold, counters.held) && counters.balanced() {
        return Ok(());
    }
    Err(ReadError::Contradiction(format!(
        "PostgreSQL contradicts itself: round {id} counts {} sold and {} held, its orders make \
         {sold} and {held}",
        counters.sold, counters.held
    )))
}

/// Whether Redis has everything that it must have. Pure.
fn matches(
    redis: &Inspection,
    position: &Position,
    floor: u64,
    provisioned: &[RoundId],
) -> Result<(), String> {
    if faults::bug("redis_believed") {
        return Ok(());
    }
    let stored = position.stored;
    let Some(epoch) = redis.epoch else {
        let fresh = position.installed.0 == 0
            && stored.pseq == 0
            && floor == 0
            && provisioned.is_empty()
            && redis.journal_length == Some(0);
        return if fresh {
            Ok(())
        } else {
            Err(format!(
                "Redis does not know the partition, but PostgreSQL has {} rounds of it and its \
                 journal up to entry {}",
                provisioned.len(),
                stored.pseq
            ))
        };
    };
    // A server that has lost nothing since its epoch began may be ahead: then PostgreSQL has been
    // set back, and the journal has what it forgot.
    let ahead = epoch > position.epoch && !redis.same_incarnation;
    if ahead || epoch < position.installed || epoch < stored.epoch {
        return Err(format!(
            "Redis is in epoch {}, PostgreSQL in {} (last installed {}, last stored {})",
            epoch.0, position.epoch.0, position.installed.0, stored.epoch.0
        ));
    }
    if redis.pseq < stored.pseq.max(floor) {
        return Err(format!(
            "Redis has {} journal entries, but {} were seen and {} are stored",
            redis.pseq, floor, stored.pseq
        ));
    }
    let journal = (
        redis.journal_length,
        redis.journal_first,
        redis.journal_last,
    );
    let whole = match journal {
        (Some(0), None, None) => redis.pseq == stored.pseq,
        (Some(length), Some(first), Some(last)) => {
            last.pseq == redis.pseq
                && first.pseq <= stored.pseq + 1
                && length == last.pseq - first.pseq + 1
        }
        _ => false,
    };
    if whole {
        Ok(())
    } else {
        Err(format!(
            "the journal has {:?} entries from {} to {}; entries {} to {} are needed",
            redis.journal_length,
            redis.journal_first.map_or(0, |id| id.pseq),
            redis.journal_last.map_or(0, |id| id.pseq),
            stored.pseq + 1,
            redis.pseq
        ))
    }
}
