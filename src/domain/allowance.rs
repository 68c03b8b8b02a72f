//! How often something may be done: the rules, what each allows, and the arithmetic of spending it.
//!
//! An allowance is a generic cell rate algorithm: all that is remembered is the instant at which it
//! is whole again. Whoever does something moves that instant on by what it costs, and may not move
//! it further than the allowance reaches.

use std::{fmt, str::FromStr};

/// The largest number in an allowance: what is more is no limit.
const MOST: u32 = 1_000_000;

/// A time in which something may be done so often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Per {
    Second,
    Minute,
    Hour,
}

impl Per {
    const fn us(self) -> u64 {
        1_000_000
            * match self {
                Self::Second => 1,
                Self::Minute => 60,
                Self::Hour => 3_600,
            }
    }

    const fn letter(self) -> char {
        match self {
            Self::Second => 's',
            Self::Minute => 'm',
            Self::Hour => 'h',
        }
    }
}

/// So many at once, then so many in each second, minute or hour. Written `20+2/s`; `off` is no
/// limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// 0 without a limit.
    at_once: u32,
    then: u32,
    per: Per,
}

/// What there is too little of at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// How long until there is enough, in microseconds.
    pub wait_us: u64,
    /// What there is.
    pub left: u32,
}

impl Allowance {
    const fn new(at_once: u32, then: u32, per: Per) -> Self {
        Self { at_once, then, per }
    }

    /// How much there is at once.
    pub fn at_once(self) -> u32 {
        self.at_once
    }

    /// Whether there is no limit.
    pub fn is_off(self) -> bool {
        self.at_once == 0
    }

    /// The time in which one comes back, in microseconds.
    fn each_us(self) -> u64 {
        self.per.us() / u64::from(self.then)
    }

    /// The time in which all of it comes back, in microseconds.
    pub fn whole_us(self) -> u64 {
        self.each_us() * u64::from(self.at_once)
    }

    /// Spends `cost` at `now`, of what is whole again at `whole_at`; both in microseconds of one
    /// clock. Gives when it is whole again after that. What costs more than there is at once costs
    /// all of it.
    ///
    /// # Errors
    /// [`Short`], and nothing is spent.
    pub fn spend(self, whole_at: u64, now: u64, cost: u32) -> Result<u64, Short> {
        let cost_us = self.each_us() * u64::from(cost.min(self.at_once));
        let gone_us = whole_at.saturating_sub(now);
        let wait_us = (gone_us + cost_us).saturating_sub(self.whole_us());
        if wait_us == 0 {
            return Ok(now + gone_us + cost_us);
        }
        let left = self.whole_us().saturating_sub(gone_us) / self.each_us();
        Err(Short {
            wait_us,
            left: u32::try_from(left).unwrap_or(u32::MAX),
        })
    }
}

impl fmt::Display for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off() {
            return f.write_str("off");
        }
        write!(f, "{}+{}/{}", self.at_once, self.then, self.per.letter())
    }
}

impl FromStr for Allowance {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "off" {
            return Ok(Self::new(0, 1, Per::Second));
        }
        let (at_once, rate) = text.split_once('+').ok_or(())?;
        let (then, per) = rate.split_once('/').ok_or(())?;
        let number = |text: &str| {
            let number = text.parse().map_err(drop)?;
            (1..=MOST).contains(&number).then_some(number).ok_or(())
        };
        let per = [Per::Second, Per::Minute, Per::Hour]
            .into_iter()
            .find(|known| per.chars().eq([known.letter()]))
            .ok_or(())?;
        Ok(Self::new(number(at_once)?, number(then)?, per))
    }
}

macro_rules! rules {
    ($($(#[doc = $meaning:literal])+ $rule:ident $word:literal $at_once:literal + $then:literal / $per:ident)*) => {
        /// What is limited, and by whom it is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Rule {
            $($(#[doc = $meaning])+ $rule,)*
        }

        impl Rule {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$rule),*];

            /// Its name in the configuration, in metrics, and for clients.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$rule => $word,)*
                }
            }
        }

        /// What each rule allows.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Allowances([Allowance; Rule::ALL.len()]);

        impl Default for Allowances {
            fn default() -> Self {
                Self([$(Allowance::new($at_once, $then, Per::$per)),*])
            }
        }
    };
}

// People do not meet these: not who reloads a page all the time, nor an office of a thousand behind
// one address that comes at one instant. `docs/adr/0020-limits.md` has the reasons.
rules! {
    /// Purchases, checkouts and places in line of a user.
    UserPurchase "user.purchase" 20 + 2 / Second
    /// What a user reads.
    UserRead "user.read" 200 + 20 / Second
    /// What else a user changes.
    UserWrite "user.write" 60 + 5 / Second
    /// Event streams that a user opens.
    UserStream "user.stream" 30 + 1 / Second
    /// What an operator does on operators' routes.
    UserOperate "user.operate" 600 + 60 / Second
    /// Purchases, checkouts and places in line from an address.
    AddressPurchase "address.purchase" 2000 + 200 / Second
    /// What is read from an address.
    AddressRead "address.read" 5000 + 500 / Second
    /// What else is changed from an address.
    AddressWrite "address.write" 2000 + 200 / Second
    /// Event streams that are opened from an address.
    AddressStream "address.stream" 2000 + 100 / Second
    /// What comes to operators' routes from an address.
    AddressOperate "address.operate" 1000 + 100 / Second
    /// Events of a payment gateway's address.
    AddressWebhook "address.webhook" 2000 + 500 / Second
    /// Logins from an address, to any account.
    AddressLogin "address.login" 100 + 2 / Second
    /// Registrations from an address.
    AddressRegister "address.register" 50 + 30 / Minute
    /// Logins to one account from one address.
    PairLogin "pair.login" 10 + 6 / Minute
    /// Logins to one account from all addresses that it was never used from.
    AccountLogin "account.login" 100 + 10 / Minute
    /// Logins to all accounts, each from an address that it was never used from.
    AllLogin "all.login" 200 + 50 / Second
}

impl Allowances {
    /// What a rule allows.
    pub fn of(&self, rule: Rule) -> Allowance {
        // A rule is its place in the list of them: the two come from one declaration.
        self.0
            .get(rule as usize)
            .copied()
            .unwrap_or(Allowance::new(0, 1, Per::Second))
    }

    /// Changes one rule, as `user.purchase=20+2/s`.
    ///
    /// # Errors
    /// What is wrong, for a human.
    pub fn change(&mut self, text: &str) -> Result<(), String> {
        let (word, allowance) = text.split_once('=').unwrap_or((text, ""));
        let rule = Rule::ALL.iter().find(|rule| rule.word() == word.trim());
        let place = rule.and_then(|rule| self.0.get_mut(*rule as usize));
        let Some(place) = place else {
            let words: Vec<_> = Rule::ALL.iter().map(|rule| rule.word()).collect();
            return Err(format!(
                "`{text}` names no limit: they are {}",
                words.join(", ")
            ));
        };
        *place = allowance.trim().parse().map_err(|()| {
            format!(
                "`{text}` is no limit such as {}=20+2/s (s, m or h; 1 to {MOST}) or =off",
                word.trim()
            )
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_allowance_reads_as_it_is_written() {
        for text in ["20+2/s", "1+1/h", "1000000+1000000/m", "off"] {
            assert_eq!(text.parse::<Allowance>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "20",
            "20+2",
            "0+1/s",
            "1+0/s",
            "1+1/d",
            "1+1/ss",
            "-1+1/s",
            "1000001+1/s",
        ] {
            assert_eq!(bad.parse::<Allowance>(), Err(()), "{bad}");
        }
    }

    #[test]
    fn a_change_leaves_the_other_rules() {
        let mut allowances = Allowances::default();
        allowances.change("pair.login = 3+1/h").unwrap();
        assert_eq!(allowances.of(Rule::PairLogin).to_string(), "3+1/h");
        assert_eq!(allowances.of(Rule::UserRead).to_string(), "200+20/s");
        assert!(
            allowances
                .change("user.buy=1+1/s")
                .unwrap_err()
                .contains("user.purchase")
        );
        assert!(
            allowances
                .change("user.read=lots")
                .unwrap_err()
                .contains("20+2/s")
        );
    }

    #[test]
    fn what_is_at_once_is_there_at_once_and_one_more_is_not() {
        let allowance: Allowance = "3+2/s".parse().unwrap();
        let mut whole_at = 0;
        for _ in 0..3 {
            whole_at = allowance.spend(whole_at, 1_000_000, 1).unwrap();
        }
        let short = |wait_us, left| Err(Short { wait_us, left });
        assert_eq!(allowance.spend(whole_at, 1_000_000, 1), short(500_000, 0));
        assert_eq!(allowance.spend(whole_at, 1_499_999, 1), short(1, 0));
        assert_eq!(allowance.spend(whole_at, 1_500_000, 1), Ok(3_000_000));
        // Costs: two of the three, and more than there ever is.
        assert_eq!(allowance.spend(whole_at, 2_000_000, 3), short(500_000, 2));
        assert_eq!(allowance.spend(0, 5_000_000, 100), Ok(6_500_000));
    }

    proptest! {
        /// Over any time nobody gets more than what is at once and what came back meanwhile, and
        /// whoever waits as long as he is told gets what he asked for.
        #[test]
        fn nobody_gets_more_than_is_allowed(
            at_once in 1_u32..50, then in 1_u32..50,
            steps in prop::collection::vec((0_u64..400_000, 1_u32..5), 1..200),
        ) {
            let allowance = Allowance::new(at_once, then, Per::Second);
            let (mut now, mut whole_at, mut spent) = (7, 0, 0);
            for (pause, cost) in steps {
                now += pause;
                match allowance.spend(whole_at, now, cost) {
                    Ok(next) => {
                        whole_at = next;
                        spent += u64::from(cost.min(at_once));
                    }
                    Err(short) => {
                        prop_assert!(short.left < cost.min(at_once));
                        prop_assert!(allowance.spend(whole_at, now + short.wait_us, cost).is_ok());
                        prop_assert!(allowance.spend(whole_at, now + short.wait_us - 1, cost).is_err());
                    }
                }
                prop_assert!((spent - u64::from(at_once).min(spent)) * allowance.each_us() <= now);
            }
        }
    }
}
