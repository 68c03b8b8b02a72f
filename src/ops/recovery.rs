//! Looks at a fenced partition, and lets it sell again when nothing can be missing: as it is, or
//! made anew from PostgreSQL and the journal. Otherwise an operator decides (`stockade rebuild`).
//!
//! One at a time, by a lock in PostgreSQL. The epoch is raised there first, so that no writer stores
//! anything of an older timeline; then Redis' meta is written, if Redis is still exactly as it was
//! inspected.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use chrono::DateTime;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::assess::{Assessment, DEAD, Loss, Survives, Verdict, capped, matches};
use crate::{
    clock,
    domain::{
        id::{Epoch, JournalId, Partition, RoundId},
        journal::Delta,
        model::Model,
        order::{Durability, Mode, Order, Status},
        round::{Counters, Intent, Terms},
    },
    engine::{Engine, Engines, Fence, Inspection, SaleImage, read_payload},
    faults,
    metrics::{PartitionLabels, RecoveryMetrics},
    store::{
        Database, StoreError,
        audit::Snapshot,
        epochs::Epochs,
        floors::Floors,
        incidents::{self, Incidents},
        journal::Positions,
        lock::RecoveryLock,
        orders::Place,
        rebuild::StoredLetter,
        rounds::Rounds,
    },
};

/// The time between two looks at a partition that stays fenced.
const PERIOD: Duration = Duration::from_millis(250);

/// The time between two reports of how far this node has seen.
const REPORT: Duration = Duration::from_secs(1);

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
    /// What each epoch has of the ones before.
    pub epochs: Epochs,
    /// What is lost.
    pub incidents: Incidents,
    /// What Redis is made anew from.
    pub database: Database,
    /// This process.
    pub node: Uuid,
    /// Whether it sells what it recovers, and is asked how far it has seen.
    pub sells: bool,
    /// What it counts.
    pub metrics: RecoveryMetrics,
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

/// What becomes of an acceptance that was not stored when it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is stored now.
    Stored,
    /// It waits for the writer, or for a recovery.
    Open,
    /// This epoch began without it, with the entries up to this one.
    Lost(Epoch, u64),
}

/// What became of the acceptances of an entry. `begun` are the epochs that have begun, in order.
fn fate(at: JournalId, stored: JournalId, begun: &[(Epoch, u64)]) -> Fate {
    let without = begun
        .iter()
        .find(|(epoch, end)| *epoch > at.epoch && *end < at.pseq);
    match without {
        Some((epoch, end)) => Fate::Lost(*epoch, *end),
        // Everything that survives into a later epoch is stored before that epoch's first entry.
        None if stored.epoch > at.epoch => Fate::Stored,
        None if stored.epoch == at.epoch && stored.pseq >= at.pseq => Fate::Stored,
        None => Fate::Open,
    }
}

fn passing(error: &dyn std::fmt::Display) -> StaysFenced {
    StaysFenced::Passing(error.to_string())
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
                    if let Err(error) = self.look(engine).await {
                        // It does not stop the sale.
                        tracing::debug!(%partition, %error, "the partition was not looked at");
                    }
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

    /// What a node that sells does once a second: it says how far it has seen, looks whether Redis
    /// and PostgreSQL are still in its epoch, and settles what it has accepted.
    async fn look(&self, engine: &Engine) -> Result<(), StaysFenced> {
        self.report(engine, false).await?;
        let partition = engine.partition();
        let selling_in = engine.floor().epoch;
        let position = self.positions.of(partition).await;
        if let Ok(inspection) = engine.inspect().await
            && !(inspection.same_incarnation && inspection.epoch == Some(selling_in))
        {
            engine.fence_again("Redis is in another epoch, or another server");
        }
        let position = position.map_err(|error| passing(&error))?;
        // Either way nothing of ours is stored any more: somebody went on, or a standby of PostgreSQL
        // that was behind has taken over.
        if position.epoch > selling_in && !faults::bug("older_epoch_sells_on") {
            engine.fence_again("another epoch has begun");
        } else if position.epoch < selling_in {
            engine.fence_again("PostgreSQL has forgotten this epoch");
        }
        self.bury(engine).await?;
        self.settle(engine, position.stored).await?;
        self.count(partition).await
    }

    async fn count(&self, partition: Partition) -> Result<(), StaysFenced> {
        let counts = self.incidents.counts(partition).await;
        let counts = counts.map_err(|error| passing(&error))?;
        let labels = PartitionLabels {
            partition: partition.0,
        };
        self.metrics
            .incidents
            .get_or_create(&labels)
            .set(counts.incidents);
        self.metrics
            .lost_acceptances
            .get_or_create(&labels)
            .set(counts.lost);
        Ok(())
    }

    /// Forgets the acceptances that are stored, and reports those that an epoch began without.
    async fn settle(&self, engine: &Engine, stored: JournalId) -> Result<(), StaysFenced> {
        let partition = engine.partition();
        let unstored = engine.unstored();
        let begun = if unstored.is_empty() {
            Vec::new()
        } else {
            let begun = self.epochs.begun(partition).await;
            begun.map_err(|error| passing(&error))?
        };
        let mut lost: BTreeMap<(Epoch, u64), Vec<_>> = BTreeMap::new();
        for acceptance in unstored {
            if let Fate::Lost(epoch, end) = fate(acceptance.at, stored, &begun) {
                lost.entry((epoch, end)).or_default().push(acceptance);
            }
        }
        for (began, acceptances) in lost {
            if faults::bug("losses_not_reported") {
                break;
            }
            let reported = self
                .incidents
                .report(partition, self.node, began, acceptances, clock::new_id())
                .await;
            let (incident, new) = reported.map_err(|error| passing(&error))?;
            if new > 0 {
                tracing::error!(
                    %partition,
                    %incident,
                    acceptances = new,
                    epoch = began.0.0,
                    recovered_to = began.1,
                    "accepted orders are lost; they are listed, and their receipts can be redeemed"
                );
            }
        }
        engine.forget_unstored(stored, |at| fate(at, stored, &begun) != Fate::Open);
        Ok(())
    }

    /// Keeps on record what this node has accepted and may be lost, should it not live to say so.
    async fn endanger(&self, engine: &Engine) -> Result<(), StaysFenced> {
        let unstored = engine.unstored();
        if unstored.is_empty() || faults::bug("danger_not_kept") {
            return Ok(());
        }
        self.incidents
            .endanger(engine.partition(), self.node, &unstored)
            .await
            .map_err(|error| passing(&error))
    }

    /// Looks at one partition; lets it sell if nothing can be missing.
    ///
    /// # Errors
    /// [`StaysFenced`].
    pub async fn verify(&self, engine: &Engine) -> Result<Verified, StaysFenced> {
        // It sells nothing at the moment: whoever recovers it may rely on that.
        self.report(engine, true).await?;
        let assessment = self.assess(engine).await?;
        if assessment.verdict() == Verdict::Adopt {
            return self.adopt(engine, &assessment).await;
        }
        let Some(_lock) = self.lock(engine.partition()).await? else {
            return Err(another_at_work());
        };
        // Only now nobody else changes it.
        let assessment = self.assess(engine).await?;
        match assessment.verdict() {
            Verdict::Adopt => self.adopt(engine, &assessment).await,
            Verdict::Begin { doubt } => self.begin(engine, &assessment, doubt).await,
            Verdict::Rebuild => self.rebuild(engine, &assessment, None).await,
            Verdict::Wait(reason) => Err(StaysFenced::Passing(reason)),
            Verdict::Stop(reason) => Err(StaysFenced::Lost(reason)),
            Verdict::Lost(loss) => {
                self.endanger(engine).await?;
                Err(StaysFenced::Lost(format!(
                    "{}: see `stockade rebuild --dry-run`",
                    loss.reason
                )))
            }
        }
    }

    /// Takes the right to recover a partition; `None` while somebody else has it.
    ///
    /// # Errors
    /// [`StaysFenced::Passing`].
    pub async fn lock(&self, partition: Partition) -> Result<Option<RecoveryLock>, StaysFenced> {
        let taken = RecoveryLock::take(&self.database, partition).await;
        taken.map_err(|error| passing(&error))
    }

    /// Makes a partition anew without what is missing, as an operator has decided. `grace` is the
    /// time in which only receipts are redeemed. The lock must be held.
    ///
    /// # Errors
    /// [`StaysFenced`].
    pub async fn rebuild_with_loss(
        &self,
        engine: &Engine,
        assessment: &Assessment,
        loss: Loss,
        grace: Duration,
    ) -> Result<Verified, StaysFenced> {
        let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
        let until_ms = assessment.redis.now_ms.saturating_add(grace_ms);
        let loss = incidents::Loss {
            id: clock::new_id(),
            kind: incidents::Kind::Accepted,
            seen_to: loss.seen_to,
            silent_nodes: u32::try_from(loss.silent).unwrap_or(u32::MAX),
            reason: loss.reason,
            grace_until: DateTime::from_timestamp_millis(until_ms).filter(|_| grace_ms > 0),
        };
        self.rebuild(engine, assessment, Some(loss)).await
    }

    /// Everything that there is to know of a partition. Changes nothing.
    ///
    /// # Errors
    /// [`StaysFenced::Passing`] when somebody does not answer.
    pub async fn assess(&self, engine: &Engine) -> Result<Assessment, StaysFenced> {
        let partition = engine.partition();
        // PostgreSQL first: Redis may be further, never behind.
        let position = self.positions.of(partition).await;
        let position = position.map_err(|error| passing(&error))?;
        let redis = engine.inspect().await.map_err(|error| passing(&error))?;
        // A new server may have other settings, and acceptances say what they survive.
        engine
            .read_settings()
            .await
            .map_err(|error| passing(&error))?;
        // Within one run of the server time stands still until a clock that was set back has caught
        // up. A server that comes with another clock is believed neither ahead nor behind.
        let clock_ms = if redis.same_incarnation {
            redis.now_ms
        } else {
            redis.clock_ms
        };
        let clock_ahead_ms = engine.redis_ms().map(|estimate| clock_ms - estimate);
        let provisioned = self.rounds.provisioned(partition).await;
        let provisioned = provisioned.map_err(|error| passing(&error))?;
        let settled = self.incidents.settled(partition).await;
        let settled = settled.map_err(|error| passing(&error))?;
        let nodes = self.floors.of(partition).await;
        let nodes = nodes.map_err(|error| passing(&error))?;

        // A later timeline was begun with proof; what an older one had reached is settled. An
        // epoch that was raised and never installed sold nothing.
        let present = redis.epoch.unwrap_or(position.installed);
        let own = engine.floor();
        let own = (own.epoch >= present && own.epoch.0 > 0)
            .then(|| capped(own.epoch, own.pseq, &settled));
        let others: Vec<_> = nodes
            .into_iter()
            .filter(|node| node.node != self.node && node.floor.epoch >= present)
            .map(|mut node| {
                node.floor.pseq = capped(node.floor.epoch, node.floor.pseq, &settled);
                // Of an epoch that an operator has given up nothing more is expected.
                node.last_word |= settled.iter().any(|(began, _)| *began > node.floor.epoch);
                node
            })
            .collect();
        let floor = others.iter().map(|node| node.floor.pseq).chain(own).max();
        let lost = matches(&redis, &position, floor.unwrap_or(0), &provisioned).err();
        let incomplete = match &lost {
            Some(_) => Vec::new(),
            None => engine
                .incomplete(&redis, &provisioned)
                .await
                .map_err(|error| passing(&error))?,
        };
        let (damage, sales) = match (lost, incomplete.first()) {
            (Some(reason), _) => {
                let sales = provisioned.iter().map(|round| round.sale).collect();
                (Some(reason), sales)
            }
            (None, Some(first)) => {
                let reason = format!(
                    "{} of {} rounds are missing or not whole in Redis, the first is {first}",
                    incomplete.len(),
                    provisioned.len()
                );
                let sales = incomplete.iter().map(|round| round.sale).collect();
                (Some(reason), sales)
            }
            (None, None) => (None, BTreeSet::new()),
        };
        Ok(Assessment {
            partition,
            position,
            synced: engine.gives(Mode::Default) == Ok(Durability::Fsync),
            others,
            own,
            survives: Survives::of(&redis, &position),
            damage,
            sales,
            clock_ahead_ms,
            redis,
        })
    }

    /// Sells in the epoch that is there.
    async fn adopt(
        &self,
        engine: &Engine,
        assessment: &Assessment,
    ) -> Result<Verified, StaysFenced> {
        let (position, redis) = (&assessment.position, &assessment.redis);
        let begun = JournalId {
            epoch: position.epoch,
            pseq: redis.pseq,
        };
        if position.installed != position.epoch {
            self.note_installed(engine.partition(), position.epoch)
                .await?;
        }
        self.open(engine, begun, redis).await?;
        Ok(Verified::Adopted)
    }

    /// Begins an epoch on a partition that is whole.
    async fn begin(
        &self,
        engine: &Engine,
        assessment: &Assessment,
        doubt: usize,
    ) -> Result<Verified, StaysFenced> {
        let (position, redis) = (&assessment.position, &assessment.redis);
        let partition = engine.partition();
        let loss = (doubt > 0).then(|| incidents::Loss {
            id: clock::new_id(),
            kind: incidents::Kind::Possible,
            seen_to: assessment.seen_to(),
            silent_nodes: u32::try_from(doubt).unwrap_or(u32::MAX),
            reason: "another Redis than before, or one that syncs once a second, took over, and \
                     nodes that sold are gone: what only they answered may be lost"
                .to_owned(),
            grace_until: None,
        });
        if let Some(loss) = &loss {
            tracing::error!(%partition, incident = %loss.id, nodes = doubt, "{}", loss.reason);
        }
        let raised = self
            .positions
            .raise_epoch(
                partition,
                position.epoch,
                redis.last_epoch(),
                redis.pseq,
                loss,
            )
            .await
            .map_err(|error| passing(&error))?
            .ok_or_else(another_at_work)?;
        faults::point("recovery.after_raise");
        let entry = self.install(engine, raised.epoch, redis).await?;
        Ok(Verified::Begun(entry))
    }

    /// Writes the epoch into Redis, notes that it is there, and sells.
    async fn install(
        &self,
        engine: &Engine,
        epoch: Epoch,
        inspection: &Inspection,
    ) -> Result<JournalId, StaysFenced> {
        let entry = engine.install(epoch, inspection).await;
        let entry = entry.map_err(|error| passing(&error))?;
        faults::point("recovery.after_install");
        self.note_installed(engine.partition(), epoch).await?;
        self.open(engine, entry, inspection).await?;
        Ok(entry)
    }

    async fn note_installed(&self, partition: Partition, epoch: Epoch) -> Result<(), StaysFenced> {
        match self.positions.set_installed(partition, epoch).await {
            Ok(true) => Ok(()),
            // Nobody would store what is sold in ours.
            Ok(false) => Err(StaysFenced::Passing("another epoch has begun".to_owned())),
            Err(error) => Err(passing(&error)),
        }
    }

    /// Lets purchases through, once PostgreSQL knows that this node sells in this epoch.
    async fn open(
        &self,
        engine: &Engine,
        begun: JournalId,
        inspection: &Inspection,
    ) -> Result<(), StaysFenced> {
        if !self.sells {
            return Ok(());
        }
        self.floors
            .report(engine.partition(), self.node, begun, false)
            .await
            .map_err(|error| passing(&error))?;
        engine.open(begun, inspection);
        Ok(())
    }

    /// Says how far this node has seen.
    async fn report(&self, engine: &Engine, last_word: bool) -> Result<(), StaysFenced> {
        let floor = engine.floor();
        if floor.epoch.0 == 0 {
            return Ok(());
        }
        let reported = self
            .floors
            .report(engine.partition(), self.node, floor, last_word);
        reported.await.map_err(|error| passing(&error))
    }

    /// Takes over what nodes that are gone may have seen: Redis, asked now, is as far as any of
    /// them ever saw it in this epoch.
    async fn bury(&self, engine: &Engine) -> Result<(), StaysFenced> {
        let partition = engine.partition();
        let nodes = self.floors.of(partition).await;
        let nodes = nodes.map_err(|error| passing(&error))?;
        let gone: Vec<_> = nodes
            .iter()
            .filter(|node| node.node != self.node && node.age > 3 * DEAD)
            .map(|node| node.node)
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        let inspection = engine.inspect().await.map_err(|error| passing(&error))?;
        if !inspection.same_incarnation || !engine.learn_floor(&inspection) {
            return Ok(());
        }
        self.report(engine, false).await?;
        self.floors
            .forget(partition, gone)
            .await
            .map_err(|error| passing(&error))
    }

    /// Makes sales anew that are not whole, from what survives.
    async fn rebuild(
        &self,
        engine: &Engine,
        assessment: &Assessment,
        loss: Option<incidents::Loss>,
    ) -> Result<Verified, StaysFenced> {
        let (position, redis) = (&assessment.position, &assessment.redis);
        let partition = engine.partition();
        let mut survives = assessment.survives;
        if loss.is_some() && survives.journal {
            match self
                .image(engine, partition, position.stored, &survives)
                .await
            {
                // The end of the journal is of no use, and its loss is accepted.
                Err(StaysFenced::Lost(_)) => survives = Survives::without_journal(position),
                read => drop(read?),
            }
        }
        let raised = self
            .positions
            .raise_epoch(
                partition,
                position.epoch,
                redis.last_epoch(),
                survives.end,
                loss,
            )
            .await
            .map_err(|error| passing(&error))?
            .ok_or_else(another_at_work)?;
        faults::point("recovery.after_raise");
        let (model, entries) = self
            .image(engine, partition, raised.stored, &survives)
            .await?;
        if model.pseq != survives.end {
            return Err(StaysFenced::Passing(
                "the journal moved while it was read".to_owned(),
            ));
        }
        engine
            .begin_rebuild(raised.epoch, redis, survives.end, survives.journal)
            .await
            .map_err(|error| passing(&error))?;
        // Whoever had begun before us may have left anything behind.
        let all = redis.epoch.is_none();
        let mut rebuilt = 0;
        for (number, sale) in &model.sales {
            if !all && !assessment.sales.contains(number) {
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
            let loaded = engine.load(raised.epoch, &image).await;
            loaded.map_err(|error| passing(&error))?;
            rebuilt += 1;
        }
        faults::point("recovery.after_load");
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

    /// What Redis must have, and the last entry that touched each round.
    async fn image(
        &self,
        engine: &Engine,
        partition: Partition,
        stored: JournalId,
        survives: &Survives,
    ) -> Result<(Model, BTreeMap<RoundId, JournalId>), StaysFenced> {
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

fn another_at_work() -> StaysFenced {
    StaysFenced::Passing("another node is at work".to_owned())
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
    let mut letters: BTreeMap<RoundId, Vec<StoredLetter>> = BTreeMap::new();
    for letter in snapshot.letters(partition).await? {
        letters.entry(letter.round).or_default().push(letter);
    }
    let archived = snapshot.archived(partition).await?;
    for (id, stored) in rounds.iter().filter(|(_, round)| round.provisioned) {
        entries.insert(*id, stored.entry);
        if stored.intent == Intent::Archived {
            let left = archived.get(id).copied().unwrap_or_default();
            let sold = left.sold.saturating_add_signed(stored.dead.sold);
            let held = 0_u64.saturating_add_signed(stored.dead.held);
            check(*id, &stored.counters, sold, held)?;
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
        // What those letters stand for that are orders again counts with the orders.
        let back = letters
            .get(id)
            .filter(|_| !faults::bug("rebuild_forgets_dead_letters"))
            .map_or(Delta::default(), |letters| resurrect(&mut orders, letters));
        let units = |held: bool| -> u64 {
            orders
                .iter()
                .filter(|order| (order.status == Status::Held) == held)
                .map(Order::taken)
                .sum()
        };
        let sold = units(false).saturating_add_signed(stored.dead.sold - back.sold);
        let held = units(true).saturating_add_signed(stored.dead.held - back.held);
        check(*id, &stored.counters, sold, held)?;
        model.restore(*id, stored.terms, stored.intent, stored.counters, orders);
        if let Some(round) = model.rounds.get_mut(id) {
            round.grace_until_ms = stored.grace_until_ms;
            if stored.terms.policy.waitlist {
                round.line = snapshot.line(*id).await?;
            }
        }
    }
    for (sale, buyer, (units, acceptances)) in snapshot.archived_buyers(partition).await? {
        if let Some(sale) = model.sales.get_mut(&sale) {
            let known = sale.buyers.entry(buyer).or_default();
            known.0 += units;
            known.1 += acceptances;
        }
    }
    for operation in snapshot.operations(partition).await? {
        if faults::bug("rebuild_forgets_operations") {
            break;
        }
        if let Some(sale) = model.sales.get_mut(&operation.sale) {
            sale.operations
                .insert(operation.operation, (operation.fingerprint, operation.seq));
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

/// Adds the orders that are dead letters of a round to those that are stored, and gives both the
/// status that those letters leave them with. Gives what these letters stand for; what cannot be
/// read is left out.
fn resurrect(orders: &mut Vec<Order>, letters: &[StoredLetter]) -> Delta {
    let mut delta = Delta::default();
    for letter in letters {
        let Some(id) = letter.order else { continue };
        let Some((accepted, events)) = read_payload(letter.round, &letter.payload) else {
            continue;
        };
        let accepted = accepted
            .into_iter()
            .find(|order| order.id == id && order.seq == letter.seq_from);
        let event = events.iter().find(|event| event.seq == letter.seq_from);
        if let Some(order) = accepted {
            orders.push(order.as_accepted());
        } else if let Some(order) = orders.iter_mut().find(|order| order.id == id)
            && event.is_some_and(|event| event.change(order).is_some())
        {
        } else {
            continue;
        }
        delta = delta + letter.delta;
    }
    delta
}
