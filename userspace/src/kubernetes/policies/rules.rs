//! The rules of an AuthorizationPolicy.

use crate::kubernetes::{
    field::{Field, Findings},
    problem::Flaw,
};
use crate::mesh::policy::{AccountPattern, Action, Condition, OneOf, Operation, Pattern, Rule, Source};
use ipnet::IpNet;

const HTTP_SOURCE: [&str; 4] = [
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];
const HTTP_OPERATION: [&str; 6] = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];

/// Reads rules of one policy. A field that cannot be judged at L4 is left out, and marks its rule.
pub(super) struct RuleReader<'r> {
    pub(super) namespace: &'r str,
    pub(super) action: Action,
    pub(super) findings: &'r mut Findings,
}

impl RuleReader<'_> {
    pub(super) fn rule(&mut self, field: &Field<'_>) -> Rule {
        let mut rule = Rule::default();
        if !field.is_object() {
            self.unjudged(field, Flaw::WrongType { expected: "an object" }, &mut rule.beyond_l4);
        }
        for key in field.keys() {
            let member = field.get_even_null(key);
            match key {
                "from" => rule.from = self.entries(&member, &mut rule.beyond_l4, Self::source),
                "to" => rule.to = self.entries(&member, &mut rule.beyond_l4, Self::operation),
                "when" => {
                    let conditions = self.entries(&member, &mut rule.beyond_l4, Self::condition);
                    rule.when = conditions.into_iter().flatten().collect();
                }
                _ => self.unjudged(&member, Flaw::UnknownField, &mut rule.beyond_l4),
            }
        }
        if self.action == Action::Deny && rule.beyond_l4 && rule.matches_everything() {
            self.findings.add(field, Flaw::DeniesEverything);
        }
        rule
    }

    fn unjudged(&mut self, field: &Field<'_>, flaw: Flaw, beyond_l4: &mut bool) {
        *beyond_l4 = true;
        self.findings.add(field, flaw);
    }

    /// An explicit list of nothing would match nothing: that is no rule anyone meant.
    fn elements<'f>(&mut self, field: &Field<'f>, beyond_l4: &mut bool) -> Vec<Field<'f>> {
        if !field.is_list() {
            self.unjudged(field, Flaw::WrongType { expected: "a list" }, beyond_l4);
            return Vec::new();
        }
        let elements = field.list(self.findings);
        if elements.is_empty() {
            self.unjudged(field, Flaw::Empty, beyond_l4);
        }
        elements
    }

    fn entries<T>(
        &mut self,
        field: &Field<'_>,
        beyond_l4: &mut bool,
        read: fn(&mut Self, &Field<'_>, &mut bool) -> T,
    ) -> Vec<T> {
        self.elements(field, beyond_l4)
            .iter()
            .map(|entry| read(self, entry, beyond_l4))
            .collect()
    }

    fn source(&mut self, entry: &Field<'_>, beyond_l4: &mut bool) -> Source {
        let field = entry.get("source");
        self.members(entry, &["source"], &[], beyond_l4);
        self.members(
            &field,
            &[
                "principals",
                "notPrincipals",
                "namespaces",
                "notNamespaces",
                "serviceAccounts",
                "notServiceAccounts",
                "ipBlocks",
                "notIpBlocks",
            ],
            &HTTP_SOURCE,
            beyond_l4,
        );
        let namespace = self.namespace;
        Source {
            principals: self.one_of(&field, ["principals", "notPrincipals"], beyond_l4, principal),
            namespaces: self.one_of(&field, ["namespaces", "notNamespaces"], beyond_l4, pattern),
            service_accounts: self.one_of(
                &field,
                ["serviceAccounts", "notServiceAccounts"],
                beyond_l4,
                |f, findings| Some(AccountPattern::new(filled(f, findings)?, namespace)),
            ),
            ip_blocks: self.one_of(&field, ["ipBlocks", "notIpBlocks"], beyond_l4, block),
        }
    }

    fn operation(&mut self, entry: &Field<'_>, beyond_l4: &mut bool) -> Operation {
        let field = entry.get("operation");
        self.members(entry, &["operation"], &[], beyond_l4);
        self.members(&field, &["ports", "notPorts"], &HTTP_OPERATION, beyond_l4);
        Operation {
            ports: self.one_of(&field, ["ports", "notPorts"], beyond_l4, port),
        }
    }

    /// `None` for a key that is judged at HTTP.
    fn condition(&mut self, entry: &Field<'_>, beyond_l4: &mut bool) -> Option<Condition> {
        self.members(entry, &["key", "values", "notValues"], &[], beyond_l4);
        let key = entry.get("key");
        let sides = ["values", "notValues"];
        let condition = match key.text(self.findings) {
            Some("source.ip") => Condition::SourceIp(self.one_of(entry, sides, beyond_l4, block)),
            Some("source.namespace") => Condition::SourceNamespace(self.one_of(entry, sides, beyond_l4, pattern)),
            Some("source.principal") => Condition::SourcePrincipal(self.one_of(entry, sides, beyond_l4, principal)),
            Some("destination.ip") => Condition::DestinationIp(self.one_of(entry, sides, beyond_l4, block)),
            Some("destination.port") => Condition::DestinationPort(self.one_of(entry, sides, beyond_l4, port)),
            Some(_) => {
                self.unjudged(&key, self.http_field(), beyond_l4);
                return None;
            }
            None => {
                self.unjudged(&key, Flaw::Missing, beyond_l4);
                return None;
            }
        };
        if entry.get_even_null("values").is_absent() && entry.get_even_null("notValues").is_absent() {
            self.unjudged(&entry.get("values"), Flaw::Missing, beyond_l4);
        }
        Some(condition)
    }

    /// Complains about an object that is none or empty, and about members that are HTTP's or nobody's.
    fn members(&mut self, field: &Field<'_>, known: &[&str], http: &[&str], beyond_l4: &mut bool) {
        if !field.is_object() || field.keys().next().is_none() {
            let flaw = if field.is_absent() { Flaw::Missing } else { Flaw::Empty };
            self.unjudged(field, flaw, beyond_l4);
        }
        for key in field.keys().filter(|key| !known.contains(key)) {
            let member = field.get_even_null(key);
            let flaw = if http.contains(&key) {
                self.http_field()
            } else {
                Flaw::UnknownField
            };
            self.unjudged(&member, flaw, beyond_l4);
        }
    }

    fn http_field(&self) -> Flaw {
        Flaw::HttpField {
            consequence: match self.action {
                Action::Allow => "the rule allows nothing here",
                Action::Deny => "the rule denies as if it were not there",
                Action::Audit | Action::Custom => "the rule is not enforced here",
            },
        }
    }

    /// Both sides of a field. A side with a bad value is left out as a whole: without it a DENY denies more.
    fn one_of<T>(
        &mut self,
        parent: &Field<'_>,
        [values, not_values]: [&str; 2],
        beyond_l4: &mut bool,
        parse: impl Fn(&Field<'_>, &mut Findings) -> Option<T>,
    ) -> OneOf<T> {
        let mut side = |key: &str| {
            let field = parent.get_even_null(key);
            if field.is_absent() {
                return Vec::new();
            }
            let elements = self.elements(&field, beyond_l4);
            let count = elements.len();
            let values: Vec<T> = elements
                .iter()
                .filter_map(|element| parse(element, self.findings))
                .collect();
            if values.len() == count {
                return values;
            }
            *beyond_l4 = true;
            Vec::new()
        };
        OneOf {
            values: side(values),
            not_values: side(not_values),
        }
    }
}

fn filled<'a>(field: &Field<'a>, findings: &mut Findings) -> Option<&'a str> {
    let text = field.text(findings)?;
    if text.is_empty() {
        findings.add(field, Flaw::Empty);
        return None;
    }
    Some(text)
}

fn pattern(field: &Field<'_>, findings: &mut Findings) -> Option<Pattern> {
    Some(Pattern::new(filled(field, findings)?))
}

fn principal(field: &Field<'_>, findings: &mut Findings) -> Option<Pattern> {
    let text = filled(field, findings)?;
    match text.strip_prefix("spiffe://") {
        Some(rest) => {
            findings.add(field, Flaw::SchemeInPrincipal);
            Some(Pattern::new(rest))
        }
        None => Some(Pattern::new(text)),
    }
}

fn block(field: &Field<'_>, findings: &mut Findings) -> Option<IpNet> {
    field.cidr(findings)
}

fn port(field: &Field<'_>, findings: &mut Findings) -> Option<u16> {
    field.port(findings)
}
