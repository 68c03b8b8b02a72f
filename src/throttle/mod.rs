//! Who does something too often is refused: per user, per address, per account that is logged in to.
//!
//! Each node decides from its own memory, at once, and tells the cache Redis afterwards what it has
//! allowed; what comes back is what all nodes have allowed. So no request waits for a limit, whoever
//! is refused costs nothing but a look into memory, and without the cache Redis each node goes on
//! alone. Only what adds up is told: somebody far from every limit never leaves this node.

mod sharing;
mod table;

use std::{net::IpAddr, sync::Arc, time::Duration};

use hmac::{Hmac, KeyInit, Mac, digest::InvalidLength};
use sha2::Sha256;
use tokio::sync::mpsc;
use uuid::Uuid;

pub use self::sharing::Sharing;
use self::{
    sharing::{SHARES_MAX, Share},
    table::{Key, Table},
};
use crate::{
    config::Networks,
    domain::allowance::{Allowance, Allowances, Rule},
    engine::Cache,
    metrics::{LimitMetrics, RuleLabels},
};

/// How long an address from which somebody has logged in is known: as long as a session may last.
const KNOWN_FOR: Duration = Duration::from_hours(30 * 24);

/// What kind of thing is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Buying, checking out, standing in line.
    Purchase,
    /// Reading.
    Read,
    /// Changing anything else.
    Write,
    /// Opening a stream of events.
    Stream,
    /// Operating.
    Operate,
    /// The events of a payment gateway.
    Webhook,
    /// Logging in.
    Login,
    /// Registering.
    Register,
}

impl Class {
    fn of_address(self) -> Rule {
        match self {
            Self::Purchase => Rule::AddressPurchase,
            Self::Read => Rule::AddressRead,
            Self::Write => Rule::AddressWrite,
            Self::Stream => Rule::AddressStream,
            Self::Operate => Rule::AddressOperate,
            Self::Webhook => Rule::AddressWebhook,
            Self::Login => Rule::AddressLogin,
            Self::Register => Rule::AddressRegister,
        }
    }

    fn of_user(self) -> Option<Rule> {
        match self {
            Self::Purchase => Some(Rule::UserPurchase),
            Self::Read => Some(Rule::UserRead),
            Self::Write => Some(Rule::UserWrite),
            Self::Stream => Some(Rule::UserStream),
            Self::Operate => Some(Rule::UserOperate),
            // Whoever does these is not logged in.
            Self::Webhook | Self::Login | Self::Register => None,
        }
    }
}

/// A request that was one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Which limit.
    pub rule: Rule,
    /// What it allows.
    pub allowance: Allowance,
    /// What of it is left: less than the request costs.
    pub left: u32,
    /// When the request is worth another try.
    pub wait: Duration,
}

/// What limits are made of.
#[derive(Clone, Debug)]
pub struct ThrottleSettings {
    /// What each rule allows.
    pub allowances: Allowances,
    /// Addresses without limits per address.
    pub unlimited: Networks,
    /// The same on all nodes: accounts are counted under names that nobody can make without it.
    pub secret: Vec<u8>,
}

/// The limits, or none. Cheap to clone.
#[derive(Clone)]
pub struct Throttle(Option<Arc<Inner>>);

struct Inner {
    allowances: Allowances,
    unlimited: Networks,
    names: Hmac<Sha256>,
    table: Table,
    cache: Cache,
    metrics: LimitMetrics,
}

impl Throttle {
    /// No limits at all.
    pub fn off() -> Self {
        Self(None)
    }

    /// Limits, and what has to [run](Sharing::run) for them.
    ///
    /// # Errors
    /// When the secret is of no use.
    pub fn new(
        settings: ThrottleSettings,
        cache: Cache,
        metrics: LimitMetrics,
    ) -> Result<(Self, Sharing), InvalidLength> {
        let mut names = Hmac::new_from_slice(&settings.secret)?;
        names.update(b"names of limits");
        let (shares, told) = mpsc::channel(SHARES_MAX);
        let inner = Arc::new(Inner {
            allowances: settings.allowances,
            unlimited: settings.unlimited,
            names,
            // Without a cache Redis there is nobody to tell.
            table: Table::new(cache.is_configured().then_some(shares)),
            cache,
            metrics,
        });
        let sharing = Sharing::new(told, Arc::clone(&inner));
        Ok((Self(Some(inner)), sharing))
    }

    /// Takes a request of an address from what the address may do.
    ///
    /// # Errors
    /// [`Exceeded`].
    pub fn address(&self, address: IpAddr, class: Class, cost: u32) -> Result<(), Exceeded> {
        match &self.0 {
            Some(inner) if !inner.unlimited.contain(address) => {
                inner.spend(class.of_address(), network(address), cost)
            }
            _ => Ok(()),
        }
    }

    /// Takes a request of a user from what the user may do.
    ///
    /// # Errors
    /// [`Exceeded`].
    pub fn user(&self, user: Uuid, class: Class, cost: u32) -> Result<(), Exceeded> {
        match (&self.0, class.of_user()) {
            (Some(inner), Some(rule)) => inner.spend(rule, user.as_u128(), cost),
            _ => Ok(()),
        }
    }

    /// Takes a login, before the password is looked at, from what may be tried at an account, known
    /// or not.
    ///
    /// Nobody shuts anybody out: trying from one address stops that address, and whoever tries from
    /// very many stops only addresses from which the account was never used.
    ///
    /// # Errors
    /// [`Exceeded`].
    pub async fn login(&self, email: &str, address: Option<IpAddr>) -> Result<(), Exceeded> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let account = email.trim().to_lowercase();
        let pair = inner.name(&account, address);
        inner.spend(Rule::PairLogin, pair, 1)?;
        let of_strangers = inner
            .spend(Rule::AccountLogin, inner.name(&account, None), 1)
            .and_then(|()| inner.spend(Rule::AllLogin, 0, 1));
        let Err(exceeded) = of_strangers else {
            return Ok(());
        };
        match inner.cache.get(&known(pair)).await {
            Some(_) => Ok(()),
            None => Err(exceeded),
        }
    }

    /// Notes that somebody could log in, from where.
    pub fn logged_in(&self, email: &str, address: Option<IpAddr>) {
        let Some(inner) = self.0.clone() else { return };
        let pair = inner.name(&email.trim().to_lowercase(), address);
        // The answer does not wait for it.
        tokio::spawn(async move {
            let value = bytes::Bytes::from_static(b"1");
            inner.cache.put(&known(pair), value, KNOWN_FOR).await;
        });
    }
}

impl Inner {
    fn spend(&self, rule: Rule, who: u128, cost: u32) -> Result<(), Exceeded> {
        let allowance = self.allowances.of(rule);
        if allowance.is_off() {
            return Ok(());
        }
        let key = Key { rule, who };
        self.table.spend(key, allowance, cost).map_err(|short| {
            let labels = RuleLabels { rule: rule.word() };
            self.metrics.refused.get_or_create(&labels).inc();
            Exceeded {
                rule,
                allowance,
                left: short.left,
                wait: Duration::from_micros(short.wait_us),
            }
        })
    }

    /// What an account, perhaps at an address, is counted as: nothing that gives the account away.
    fn name(&self, account: &str, address: Option<IpAddr>) -> u128 {
        let mut name = self.names.clone();
        if let Some(address) = address {
            name.update(&network(address).to_be_bytes());
        }
        name.update(account.as_bytes());
        let bytes = name.finalize().into_bytes();
        bytes
            .iter()
            .take(16)
            .fold(0, |name, byte| name << 8 | u128::from(*byte))
    }
}

/// Where it is noted that an account was used from an address.
fn known(pair: u128) -> String {
    format!("known:{pair:032x}")
}

/// What an address is counted as: itself, or the network of IPv6 that one subscriber has.
pub fn network(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits() >> 64 << 64,
    }
}

impl Share {
    /// What the cache Redis calls it.
    fn name(&self) -> String {
        format!("limit:{}:{:032x}", self.key.rule.word(), self.key.who)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(changes: &[&str], unlimited: &str) -> Throttle {
        let mut allowances = Allowances::default();
        for change in changes {
            allowances.change(change).unwrap();
        }
        let settings = ThrottleSettings {
            allowances,
            unlimited: serde_json::from_value(unlimited.into()).unwrap(),
            secret: b"secret".to_vec(),
        };
        let (throttle, _) =
            Throttle::new(settings, Cache::default(), LimitMetrics::default()).unwrap();
        throttle
    }

    #[test]
    fn a_subscriber_of_ipv6_is_one_and_clothes_do_not_matter() {
        let network = |text: &str| network(text.parse().unwrap());
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }

    #[test]
    fn users_addresses_and_classes_are_counted_apart() {
        let limits = [
            "user.purchase=2+1/h",
            "address.read=1+1/h",
            "user.write=off",
        ];
        let throttle = throttle(&limits, "10.0.0.0/8");
        let (ada, bob) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let buy = |user| throttle.user(user, Class::Purchase, 1);
        buy(ada).unwrap();
        buy(ada).unwrap();
        let exceeded = buy(ada).unwrap_err();
        assert_eq!((exceeded.rule, exceeded.left), (Rule::UserPurchase, 0));
        assert!(exceeded.wait > Duration::from_mins(59), "{exceeded:?}");
        buy(bob).unwrap();
        throttle.user(ada, Class::Read, 1).unwrap();
        throttle.user(ada, Class::Write, 1_000_000).unwrap();

        let read = |address: &str| throttle.address(address.parse().unwrap(), Class::Read, 1);
        read("192.0.2.1").unwrap();
        read("192.0.2.1").unwrap_err();
        read("192.0.2.2").unwrap();
        for _ in 0..9 {
            read("10.1.2.3").unwrap();
        }
        Throttle::off().user(ada, Class::Purchase, 1).unwrap();
    }

    #[tokio::test]
    async fn whoever_tries_passwords_from_one_address_shuts_out_only_himself() {
        let throttle = throttle(&["pair.login=3+1/h", "account.login=5+1/h"], "");
        let (attacker, victim) = (Some([192, 0, 2, 1].into()), Some([192, 0, 2, 2].into()));
        for _ in 0..3 {
            throttle.login("ada@example.org", attacker).await.unwrap();
        }
        for _ in 0..100 {
            let refused = throttle.login(" Ada@example.org", attacker).await;
            assert_eq!(refused.unwrap_err().rule, Rule::PairLogin);
        }
        throttle.login("ada@example.org", victim).await.unwrap();
        throttle.login("bob@example.org", attacker).await.unwrap();
        // From many addresses it is the account that is closed to strangers.
        throttle
            .login("ada@example.org", Some([192, 0, 2, 3].into()))
            .await
            .unwrap();
        let refused = throttle
            .login("ada@example.org", Some([192, 0, 2, 4].into()))
            .await;
        assert_eq!(refused.unwrap_err().rule, Rule::AccountLogin);
    }
}
