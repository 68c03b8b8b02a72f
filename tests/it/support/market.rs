//! A market: buyers and operators who do what they like with a few small sales, at all nodes, and
//! insist on their answers as good clients do. Everything is written down.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use stockade::{
    auth::{Role, token::TokenKeys},
    clock,
    domain::limits::CALL_DEADLINE_MS,
};
use tokio::{
    sync::{RwLock, RwLockWriteGuard, watch},
    task::JoinSet,
    time::sleep,
};
use uuid::Uuid;

use super::{
    app::{App, id, token},
    history::{Kind, Outcome, Recorder},
};

/// Attempts after which a client gives up for now.
const ATTEMPTS_MAX: usize = 12;

/// The shop as its clients see it.
pub(crate) struct Market {
    pub(crate) recorder: Recorder,
    pub(crate) sales: Vec<String>,
    /// Definite answers so far.
    pub(crate) served: AtomicU64,
    doors: Vec<watch::Receiver<String>>,
    client: Client,
    keys: Arc<TokenKeys>,
    /// Accepted and not given back, as their buyers know.
    bought: Mutex<Vec<(usize, Uuid, Uuid)>>,
    /// Held by everybody who is at something; who takes it alone has silence.
    noise: RwLock<()>,
}

/// The market while it is open.
pub(crate) struct Bustle {
    pub(crate) market: Arc<Market>,
    people: JoinSet<()>,
    close: watch::Sender<bool>,
}

/// What one client asks for, as often as it must.
#[derive(Clone, Copy)]
struct Wish<'a> {
    sale: usize,
    kind: Kind,
    who: Uuid,
    key: &'a str,
}

impl Market {
    /// A market with these many sales of thirty units, of which each buyer gets three.
    pub(crate) async fn found(
        app: &App,
        sales: usize,
        doors: Vec<watch::Receiver<String>>,
    ) -> Arc<Self> {
        let mut ids = Vec::new();
        for _ in 0..sales {
            let terms = json!({ "allocation": 30, "per_buyer_limit": 3 });
            ids.push(id(&app.sale(terms).await).to_owned());
        }
        Self::of(app, ids, doors)
    }

    /// A market with sales that there are.
    pub(crate) fn of(
        app: &App,
        sales: Vec<String>,
        doors: Vec<watch::Receiver<String>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            recorder: Recorder::default(),
            sales,
            served: AtomicU64::new(0),
            doors,
            client: app.client.clone(),
            keys: app.keys(),
            bought: Mutex::default(),
            noise: RwLock::default(),
        })
    }

    /// Lets so many buyers in, and one operator for each sale.
    pub(crate) fn open(self: &Arc<Self>, buyers: usize, seed: u64) -> Bustle {
        let (close, closing) = watch::channel(false);
        let mut people = JoinSet::new();
        for number in 0..buyers {
            let (market, closing) = (Arc::clone(self), closing.clone());
            people.spawn(async move {
                let mut random = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
                while !*closing.borrow() {
                    market.visit(&mut random).await;
                    let pause = random.random_range(20..120);
                    sleep(Duration::from_millis(pause)).await;
                }
            });
        }
        for sale in 0..self.sales.len() {
            let (market, closing) = (Arc::clone(self), closing.clone());
            people.spawn(async move {
                let mut random = StdRng::seed_from_u64(!seed.wrapping_add(sale as u64));
                while !*closing.borrow() {
                    market.operate(sale, &mut random).await;
                    let pause = random.random_range(50..400);
                    sleep(Duration::from_millis(pause)).await;
                }
            });
        }
        Bustle {
            market: Arc::clone(self),
            people,
            close,
        }
    }

    /// What one buyer does who comes by.
    async fn visit(&self, random: &mut StdRng) {
        let _noise = self.noise.read().await;
        let mine = {
            let mut bought = self.bought.lock().unwrap();
            let number = bought.len();
            (number > 0 && random.random_ratio(1, 5))
                .then(|| bought.swap_remove(random.random_range(0..number)))
        };
        if let Some((sale, who, order)) = mine {
            let kind = Kind::Cancel { order };
            let key = "";
            self.insist(
                Wish {
                    sale,
                    kind,
                    who,
                    key,
                },
                random,
            )
            .await;
            return;
        }
        // Some come again and again, until their limit; most once.
        let who = if random.random_bool(0.5) {
            Uuid::from_u128(random.random_range(1..=30))
        } else {
            Uuid::from_u128(random.random())
        };
        let quantity = random.random_range(1..=3);
        let sale = random.random_range(0..self.sales.len());
        let kind = Kind::Purchase { quantity };
        let key = format!("{:016x}", random.random::<u64>());
        let key = &key;
        let wish = Wish {
            sale,
            kind,
            who,
            key,
        };
        if let Some(Outcome::Ok { body, .. }) = self.insist(wish, random).await {
            let order: Value = serde_json::from_str(&body).unwrap();
            let order = order["id"].as_str().unwrap().parse().unwrap();
            self.bought.lock().unwrap().push((sale, who, order));
        }
        // The same key again, as from another device; now and then for something else.
        if random.random_ratio(1, 4) {
            self.try_once(wish, random).await;
        }
        if random.random_ratio(1, 20) {
            let quantity = quantity % 3 + 1;
            let kind = Kind::Purchase { quantity };
            self.try_once(Wish { kind, ..wish }, random).await;
        }
    }

    async fn operate(&self, sale: usize, random: &mut StdRng) {
        let _noise = self.noise.read().await;
        if random.random_ratio(4, 5) {
            let units = random.random_range(1..=6);
            let kind = Kind::Restock { units };
            let (who, key) = (clock::new_id(), "restock");
            self.insist(
                Wish {
                    sale,
                    kind,
                    who,
                    key,
                },
                random,
            )
            .await;
            return;
        }
        let (who, key) = (clock::new_id(), "");
        let kind = Kind::Pause;
        self.insist(
            Wish {
                sale,
                kind,
                who,
                key,
            },
            random,
        )
        .await;
        sleep(Duration::from_millis(random.random_range(0..50))).await;
        // Somebody must open it again, however long it takes.
        loop {
            let (who, kind) = (clock::new_id(), Kind::Resume);
            if self
                .insist(
                    Wish {
                        sale,
                        kind,
                        who,
                        key,
                    },
                    random,
                )
                .await
                .is_some()
            {
                return;
            }
        }
    }

    /// Asks until there is a definite answer; none when it has been asked often enough.
    async fn insist(&self, wish: Wish<'_>, random: &mut StdRng) -> Option<Outcome> {
        for attempt in 1..=ATTEMPTS_MAX {
            if let Some(answer) = self.try_once(wish, random).await {
                return Some(answer);
            }
            let pause = random.random_range(20..100 * attempt as u64);
            sleep(Duration::from_millis(pause)).await;
        }
        None
    }

    /// Asks once, at any door, with more or less patience. None when the answer is not definite.
    async fn try_once(&self, wish: Wish<'_>, random: &mut StdRng) -> Option<Outcome> {
        let door = random.random_range(0..self.doors.len());
        let patience = Duration::from_millis(random.random_range(500..4_000));
        let outcome = self.ask(wish, door, patience).await;
        match &outcome {
            Outcome::Unknown(_) => None,
            Outcome::Refused { code, .. } if code == "unavailable" => None,
            Outcome::Ok { .. } | Outcome::Refused { .. } => {
                self.served.fetch_add(1, Relaxed);
                Some(outcome)
            }
        }
    }

    async fn ask(&self, wish: Wish<'_>, door: usize, patience: Duration) -> Outcome {
        let sale = &self.sales[wish.sale];
        let at_sale = |what: &str| format!("/v1/sales/{sale}/{what}");
        let (path, role, body) = match wish.kind {
            Kind::Purchase { quantity } => {
                let body = json!({ "quantity": quantity });
                (at_sale("orders"), Role::Buyer, Some(body))
            }
            Kind::Cancel { order } => (format!("/v1/orders/{order}/cancel"), Role::Buyer, None),
            Kind::Restock { units } => {
                let body = json!({ "units": units });
                (at_sale("restock"), Role::Operator, Some(body))
            }
            Kind::Pause => (at_sale("pause"), Role::Operator, None),
            Kind::Resume => (at_sale("resume"), Role::Operator, None),
            Kind::Close => (at_sale("close"), Role::Operator, None),
        };
        let mut request = self.request(door, &path, wish.who, role).timeout(patience);
        if !wish.key.is_empty() {
            request = request.header("Idempotency-Key", wish.key);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let sale = sale.parse().unwrap();
        let Wish { kind, who, key, .. } = wish;
        self.recorder.ask(sale, kind, who, key, request).await
    }

    fn request(&self, door: usize, path: &str, who: Uuid, role: Role) -> RequestBuilder {
        let url = self.doors[door].borrow().clone();
        self.client
            .request(Method::POST, format!("{url}{path}"))
            .bearer_auth(token(&self.keys, who, role))
    }

    /// Waits until everybody has done what he is at; nobody begins anything as long as this is held.
    pub(crate) async fn silence(&self) -> RwLockWriteGuard<'_, ()> {
        self.noise.write().await
    }

    /// Whether every node answers a purchase definitely, of every sale.
    pub(crate) async fn sells(&self) -> bool {
        for sale in 0..self.sales.len() {
            for door in 0..self.doors.len() {
                let (who, key) = (clock::new_id(), "probe");
                let kind = Kind::Purchase { quantity: 1 };
                let wish = Wish {
                    sale,
                    kind,
                    who,
                    key,
                };
                match self.ask(wish, door, Duration::from_secs(5)).await {
                    Outcome::Ok { .. } => {}
                    Outcome::Refused { code, .. } if code != "unavailable" => {}
                    Outcome::Refused { .. } | Outcome::Unknown(_) => return false,
                }
            }
        }
        true
    }

    /// Waits until nothing that was asked for can still happen, then asks everything again: who has
    /// an order gets the same bytes, whoever is refused now is refused for good.
    pub(crate) async fn settle(&self) {
        sleep(Duration::from_millis(CALL_DEADLINE_MS.unsigned_abs() + 500)).await;
        self.recorder.settle();
        let mut wishes = std::collections::BTreeMap::new();
        for attempt in self.recorder.history().attempts {
            if let Kind::Purchase { .. } = attempt.kind {
                let sale = self
                    .sales
                    .iter()
                    .position(|sale| *sale == attempt.sale.to_string());
                let place = (sale.unwrap(), attempt.who, attempt.key);
                let answered = matches!(attempt.outcome, Outcome::Ok { .. });
                let (kind, known) = wishes.entry(place).or_insert((attempt.kind, false));
                if answered && !*known {
                    (*kind, *known) = (attempt.kind, true);
                }
            }
        }
        let asking = wishes
            .iter()
            .map(|((sale, who, key), (kind, _))| async move {
                let wish = Wish {
                    sale: *sale,
                    kind: *kind,
                    who: *who,
                    key,
                };
                let mut random = StdRng::seed_from_u64(who.as_u64_pair().1);
                let answer = self.insist(wish, &mut random).await;
                assert!(answer.is_some(), "no definite answer for {who} {key}");
            });
        futures::stream::iter(asking)
            .buffer_unordered(32)
            .collect::<()>()
            .await;
    }
}

impl Bustle {
    /// Lets nobody in any more, and waits until the last one has gone.
    pub(crate) async fn close(self) {
        self.close.send_replace(true);
        self.people.join_all().await;
    }
}
