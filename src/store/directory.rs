//! Which sale an id or a number means, from memory.
//!
//! Every purchase asks, so the answer must not cost a query. What it says of a round does not change
//! while it runs; whoever changes a sale calls [`Directory::invalidate`]. What another node has
//! changed, and the rounds to come of sales with a schedule, are read anew all the time, with a few
//! queries for all of them. Until these have an answer the old one counts: PostgreSQL may be away for
//! a while.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{
    Database, StoreError,
    sales::{SaleFacts, Sales},
};
use crate::domain::id::{SaleId, SaleNumber};

/// Sales in memory: about half a kilobyte each.
const SALES_MAX: usize = 16_384;
/// Unknown ids in memory.
const UNKNOWN_MAX: usize = 16_384;
/// How long an unknown id stays unknown: a sale that another node just made must show up soon.
const UNKNOWN_FOR: Duration = Duration::from_secs(1);
/// Questions that wait; more than that wait for their turn to ask.
const QUESTIONS_MAX: usize = 1_024;
/// Questions that one query answers.
const QUERY_MAX: usize = 256;

/// The time between two looks for what has changed. The next round of a sale is there a whole window
/// ahead.
const REFRESH_PERIOD: Duration = Duration::from_millis(500);

/// What a sale is asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Id(SaleId),
    Number(SaleNumber),
}

type Answer = Result<Option<Arc<SaleFacts>>, Arc<StoreError>>;

struct Question {
    key: Key,
    answer: oneshot::Sender<Answer>,
}

/// The sales that this node has met.
#[derive(Clone, Debug)]
pub struct Directory {
    memory: Arc<RwLock<Memory>>,
    questions: mpsc::Sender<Question>,
    refresh: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Memory {
    sales: HashMap<SaleId, Arc<SaleFacts>>,
    numbers: HashMap<SaleNumber, SaleId>,
    unknown: HashMap<Key, Instant>,
    /// Counts invalidations: what was read before one is not remembered after it.
    generation: u64,
}

/// What is remembered of a key.
enum Remembered {
    Sale(Arc<SaleFacts>),
    Unknown,
    Nothing,
}

impl Memory {
    fn get(&self, key: Key, now: Instant) -> Remembered {
        let id = match key {
            Key::Id(id) => Some(id),
            Key::Number(number) => self.numbers.get(&number).copied(),
        };
        if let Some(facts) = id.and_then(|id| self.sales.get(&id)) {
            return Remembered::Sale(Arc::clone(facts));
        }
        match self.unknown.get(&key) {
            Some(since) if now.duration_since(*since) < UNKNOWN_FOR => Remembered::Unknown,
            _ => Remembered::Nothing,
        }
    }

    fn remember(&mut self, facts: &Arc<SaleFacts>) {
        // One that Redis does not have yet is about to change.
        if !facts.provisioned {
            return;
        }
        if self.sales.len() >= SALES_MAX
            && !self.sales.contains_key(&facts.id)
            && let Some(any) = self.sales.keys().next().copied()
        {
            self.forget(any);
        }
        self.numbers.insert(facts.number, facts.id);
        self.sales.insert(facts.id, Arc::clone(facts));
    }

    fn remember_unknown(&mut self, key: Key, now: Instant) {
        if self.unknown.len() >= UNKNOWN_MAX {
            self.unknown
                .retain(|_, since| now.duration_since(*since) < UNKNOWN_FOR);
        }
        if self.unknown.len() < UNKNOWN_MAX {
            self.unknown.insert(key, now);
        }
    }

    fn forget(&mut self, id: SaleId) {
        self.unknown.remove(&Key::Id(id));
        if let Some(facts) = self.sales.remove(&id) {
            self.numbers.remove(&facts.number);
        }
    }
}

impl Directory {
    /// An empty directory of the sales in `database`. Must be called within a runtime: one task
    /// asks PostgreSQL for everybody, so that a flood of made-up ids is one small query at a time.
    pub fn new(database: Database) -> Self {
        let memory = Arc::new(RwLock::default());
        let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
        let sales = Sales::new(database);
        let refresh = Arc::new(Notify::new());
        tokio::spawn(keep_fresh(
            sales.clone(),
            Arc::downgrade(&memory),
            Arc::clone(&refresh),
        ));
        tokio::spawn(answer(sales, Arc::clone(&memory), asked));
        Self {
            memory,
            questions,
            refresh,
        }
    }

    /// What is remembered of a sale: no question, no wait.
    pub fn remembered(&self, id: SaleId) -> Option<Arc<SaleFacts>> {
        read(&self.memory).sales.get(&id).cloned()
    }

    /// Reads rounds to come soon: there are new ones of this sale.
    pub fn refresh(&self, sale: SaleNumber) {
        if read(&self.memory).numbers.contains_key(&sale) {
            self.refresh.notify_one();
        }
    }

    /// The sale with this id.
    ///
    /// # Errors
    /// [`StoreError`], when PostgreSQL had to be asked.
    pub async fn by_id(&self, id: SaleId) -> Result<Option<Arc<SaleFacts>>, Arc<StoreError>> {
        self.get(Key::Id(id)).await
    }

    /// The sale with this number.
    ///
    /// # Errors
    /// [`StoreError`], when PostgreSQL had to be asked.
    pub async fn by_number(
        &self,
        number: SaleNumber,
    ) -> Result<Option<Arc<SaleFacts>>, Arc<StoreError>> {
        self.get(Key::Number(number)).await
    }

    /// Forgets what is known of a sale; also that it is unknown.
    pub fn invalidate(&self, id: SaleId) {
        let mut memory = write(&self.memory);
        memory.generation += 1;
        memory.unknown.clear();
        memory.forget(id);
    }

    async fn get(&self, key: Key) -> Answer {
        // The lock must be gone before anything is awaited.
        let remembered = read(&self.memory).get(key, Instant::now());
        match remembered {
            Remembered::Sale(facts) => return Ok(Some(facts)),
            Remembered::Unknown => return Ok(None),
            Remembered::Nothing => {}
        }
        let (answer, answered) = oneshot::channel();
        let gone = |()| Arc::new(StoreError::Unavailable(sqlx::Error::PoolClosed));
        self.questions
            .send(Question { key, answer })
            .await
            .map_err(|_| gone(()))?;
        answered.await.map_err(|_| gone(()))?
    }
}

/// Reads remembered sales again and again that have a schedule or that somebody has changed, for as
/// long as there is a directory.
async fn keep_fresh(sales: Sales, memory: Weak<RwLock<Memory>>, refresh: Arc<Notify>) {
    let mut looked_at = None;
    loop {
        // Both ways: told, or after a while. Told or not is all the same.
        let _ = timeout(REFRESH_PERIOD, refresh.notified()).await;
        let Some(memory) = memory.upgrade() else {
            return;
        };
        // Nobody waits for it: the next look may have an answer.
        let Ok((changed, now)) = sales.changed(looked_at).await else {
            continue;
        };
        let (ids, generation) = {
            let memory = read(&memory);
            let scheduled = memory.sales.values().filter(|sale| sale.schedule.is_some());
            let mut ids: HashSet<_> = scheduled.map(|sale| sale.id).collect();
            let changed = changed.iter().filter(|id| memory.sales.contains_key(id));
            ids.extend(changed);
            (ids.into_iter().collect::<Vec<_>>(), memory.generation)
        };
        let mut whole = true;
        for ids in ids.chunks(QUERY_MAX) {
            let found = sales.by_ids_or_numbers(ids.to_vec(), vec![]).await;
            let mut memory = write(&memory);
            match found {
                Ok(found) if memory.generation == generation => {
                    for sale in found {
                        memory.remember(&sale.facts);
                    }
                }
                _ => {
                    whole = false;
                    break;
                }
            }
        }
        if whole {
            looked_at = Some(now);
        }
    }
}

/// Answers all questions that have gathered with one query, then the next.
async fn answer(sales: Sales, memory: Arc<RwLock<Memory>>, mut asked: mpsc::Receiver<Question>) {
    let mut questions = Vec::with_capacity(QUERY_MAX);
    while asked.recv_many(&mut questions, QUERY_MAX).await > 0 {
        let now = Instant::now();
        let generation = read(&memory).generation;
        let mut ids = HashSet::new();
        let mut numbers = HashSet::new();
        // The answer may have come with an earlier query, or the caller may have gone.
        questions.retain(|question| !question.answer.is_closed());
        let mut waiting = Vec::with_capacity(questions.len());
        for question in questions.drain(..) {
            let remembered = read(&memory).get(question.key, now);
            let known = match remembered {
                Remembered::Sale(facts) => Some(Some(facts)),
                Remembered::Unknown => Some(None),
                Remembered::Nothing => None,
            };
            if let Some(known) = known {
                // Nobody hears it when the caller has gone meanwhile.
                let _ = question.answer.send(Ok(known));
                continue;
            }
            match question.key {
                Key::Id(id) => drop(ids.insert(id)),
                Key::Number(number) => drop(numbers.insert(number)),
            }
            waiting.push(question);
        }
        if waiting.is_empty() {
            continue;
        }
        let found = sales
            .by_ids_or_numbers(ids.into_iter().collect(), numbers.into_iter().collect())
            .await
            .map_err(Arc::new);
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                for question in waiting {
                    let _ = question.answer.send(Err(Arc::clone(&error)));
                }
                continue;
            }
        };
        let mut by_key = HashMap::new();
        for sale in found {
            by_key.insert(Key::Id(sale.facts.id), Arc::clone(&sale.facts));
            by_key.insert(Key::Number(sale.facts.number), sale.facts);
        }
        let mut memory = write(&memory);
        let fresh = memory.generation == generation;
        for question in waiting {
            let facts = by_key.get(&question.key);
            match facts {
                Some(facts) if fresh => memory.remember(facts),
                None if fresh => memory.remember_unknown(question.key, now),
                _ => {}
            }
            let _ = question.answer.send(Ok(facts.cloned()));
        }
    }
}

// Nothing panics while it holds the lock, so a poisoned one is still whole.
fn read(memory: &RwLock<Memory>) -> RwLockReadGuard<'_, Memory> {
    memory.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(memory: &RwLock<Memory>) -> RwLockWriteGuard<'_, Memory> {
    memory.write().unwrap_or_else(PoisonError::into_inner)
}
