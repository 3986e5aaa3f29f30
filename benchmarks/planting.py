"""Invented identifiers planted in synthetic notes, with the place of each, to measure
`radonc_jax.data.deidentify` by.

A family is a set of sentences with slots; "{kind}" or "{kind:how}" is an identifier of that class,
everything else of a sentence is none. Three sets are reported apart:

tuned     looked at while the rules were written; names of the rules' own lists
revised   written after the rules were fixed. They then found 6,628 of 8,256 identifiers (0.80), of
          names 958 of 2,068 (0.46), and were revised by what they had missed
held_out  written after that revision; no rule was changed by what it missed. (Defects that the
          unit tests and plain notes showed were mended after it; its recall stayed the same.)
          Its trap "3/2019" is a date to any reader: the cause of the false dates.
"""

import re
import string
from dataclasses import dataclass

import numpy as np

from radonc_jax.data.deidentify import CLASSES
from radonc_jax.data.lexicon import CITIES, GIVEN, SURNAMES


@dataclass(frozen=True)
class Planted:
    """Characters [start, end) of a note that are an identifier of class `kind`."""

    start: int
    end: int
    kind: str
    family: str


MONTHS = (
    "January February March April May June July August September October November December".split()
)
SHORT_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
STREETS = "Maple Oak Cedar Washington Lincoln Sunset Palo Verde Indian School Camelback".split()

TUNED = {
    "name_title": [
        "Referred by Dr. {name:surname}.",
        "Discussed with Dr {name:surname} in detail.",
        "Mrs. {name:surname} tolerated simulation well.",
        "Mr. {name:full} presents with his family.",
        "Follow up with Dr. {name:full} in 3 months.",
        "Ms. {name:surname} agrees to proceed.",
    ],
    "name_label": [
        "Patient: {name:full}.",
        "Patient name: {name:last_first}.",
        "Attending: {name:full}.",
        "PCP: {name:full}.",
        "Name: {name:last_first} seen today.",
        "Electronically signed by {name:full}.",
    ],
    "name_relation": [
        "Accompanied by daughter {name:given}.",
        "Lives with wife {name:given} and two dogs.",
        "His son {name:given} drives.",
        "Daughter, {name:full}, is the health care proxy.",
    ],
    "name_plain": [
        "{name:full} is a pleasant patient.",
        "Case of {name:last_first} reviewed.",
        "Plan reviewed by {name:full}, MD.",
        "{name:full}, PhD checked the plan.",
    ],
    "place": [
        "Lives in {place:city}.",
        "Travels from {place:city} for treatment.",
        "Address: {place:street}.",
        "Home in {place:city}, Arizona.",
        "Mail to {place:street}, {place:city}, AZ {place:zip}.",
        "ZIP {place:zip}.",
        "Mail to {place:box}.",
    ],
    "date": [
        "Biopsy on {date:us}.",
        "CT {date:us} shows response.",
        "Surgery {date:iso}.",
        "Seen {date:day_month}.",
        "Lumpectomy on {date:month_day}.",
        "Diagnosed in {date:month_year}.",
        "Simulation {date:short}.",
        "DOB {date:us}.",
        "MRI from {date:month_slash_year}.",
    ],
    "age": [
        "The patient is {age} years old.",
        "{age} yo.",
        "Age {age}.",
        "{age}-year-old with good function.",
        "Remarkably fit {age} y/o.",
    ],
    "phone": [
        "Call {phone:dashes}.",
        "Phone: {phone:brackets}.",
        "Cell {phone:dots}.",
        "Reach daughter at {phone:dashes}.",
        "Pager {phone:local}.",
    ],
    "fax": ["Fax {fax:dashes}.", "Records faxed to {fax:brackets}.", "Fax: {fax:dots}."],
    "email": ["E-mail {email}.", "Prefers contact at {email}."],
    "ssn": ["SSN {ssn:dashes}.", "Social security number: {ssn:dashes}.", "SSN: {ssn:plain}."],
    "mrn": ["MRN {mrn}.", "MRN: {mrn}.", "Medical record number {mrn}.", "MRN# {mrn}."],
    "health_plan": [
        "Member ID {health_plan:code}.",
        "Insurance policy number {health_plan:code}.",
        "Medicare {health_plan:mbi}.",
        "BCBS subscriber # {health_plan:code}.",
    ],
    "account": ["Account {account}.", "Acct # {account}.", "Billing account number: {account}."],
    "licence": ["Driver's license {licence}.", "NPI {licence:ten}.", "License no. {licence}."],
    "vehicle": ["VIN {vehicle:vin}.", "License plate {vehicle:plate}."],
    "device": [
        "Pacemaker serial number {device}.",
        "Port lot # {device}.",
        "ICD serial {device}.",
        "S/N {device}.",
    ],
    "url": ["See {url}.", "Images at {url}."],
    "ip": ["Logged from {ip:v4}.", "Portal access {ip:v4} recorded.", "IP {ip:v6}."],
    "other_id": [
        "Accession {other_id:accession}.",
        "Specimen # {other_id:code}.",
        "Case number {other_id:accession}.",
        "Order # {other_id:code}.",
    ],
}

# Sentences that hold no identifier and look as if they did.
TRAPS = [
    "Completed 3/15 fractions.", "T2N0M0, stage IIA.", "40.05 Gy in 15 fractions.",
    "1/12 nodes positive.", "PSA 8.4 on repeat.", "Gleason 3+4=7 in 3/12 cores.", "Code C50.411.",
    "Hodgkin lymphoma, Deauville 2, Lugano stage II.", "Ewing sarcoma of the rib.",
    "Breslow 2.1 mm, Clark level IV.", "Child-Pugh B7.", "Pancoast tumor.", "Klatskin tumor.",
    "Ann Arbor stage IIA.", "s/p Ivor Lewis resection.", "PSA failure by the Phoenix definition.",
    "Paget disease of the nipple.", "Merkel cell carcinoma.", "Wilms tumor.", "Barrett esophagus.",
    "Planned on TrueBeam 3.", "6/9 MeV electrons.", "SIB 70/63/56 Gy.", "45/25 to the pelvis.",
    "POD 12.", "KPS 90.", "Covered by the 95% isodose.", "Enrolled in NCT01234567.",
    "Mother with Breast cancer.", "Father: Lung cancer at 70.", "T2/3 disease on MRI.",
    "Seen by Urology.", "Discussed with Tumor Board.", "2.25 Gy/fx.", "Nottingham grade 2.",
    "May proceed with treatment.", "Bloom-Richardson score 6.", "FIGO 2018 stage IB2.",
    "Diagnosed in 2019.", "AJCC 8th edition.", "MR guidance available.", "Ki-67 20%.",
]  # fmt: skip

REVISED = {
    "name_title": [
        "Dr {name:surname}'s note was reviewed.",
        "Drs. {name:surname} and {name:surname} concur.",
        "Prof {name:initial} gave a second opinion.",
        "Mr {name:surname} and his wife had many questions.",
        "I saw Ms {name:surname} in clinic.",
    ],
    "name_label": [
        "Patient Name - {name:shout}.",
        "RE: {name:full}.",
        "Dictated by: {name:initial}.",
        "Oncologist: Dr. {name:full}.",
        "Emergency contact: {name:full} (spouse).",
    ],
    "name_relation": [
        "Her husband, {name:given}, was on the phone.",
        "Sister ({name:given}) is a nurse.",
        "Here with partner {name:given} today.",
        "Niece is {name:full}.",
    ],
    "name_cue": [
        "Surgery was done by {name:initial}.",
        "Case discussed with {name:surname}.",
        "We thank {name:full} for the referral.",
        "{name:full}, DO will follow.",
        "Cc {name:surname}, {name:surname}.",
    ],
    "name_bare": [
        "{name:surname} tolerated treatment well.",
        "{name:full} was counseled on risks.",
        "{name:given} wishes to start next week.",
        "Spoke to {name:given} by telephone.",
    ],
    "place": [
        "Resides in {place:city} with her sister.",
        "Patient is from {place:city}.",
        "He drove two hours from {place:city}.",
        "Lives at {place:street_north}.",
        "Residence: {place:street_number}.",
        "{place:city}, AZ.",
        "Works on a farm in {place:county} County.",
        "Mailing address {place:city} AZ {place:zip4}.",
    ],
    "date": [
        "Biopsied {date:dots}.",
        "Last seen {date:dashes}.",
        "PET/CT {date:oracle} negative.",
        "Treated on {date:ordinal}.",
        "Next visit {date:month_ordinal}.",
        "Started RT on {date:no_year}.",
        "Colonoscopy {date:compact}.",
        "Diagnosed {date:apostrophe}.",
        "Note signed {date:time}.",
        "Treated between {date:us} and {date:short}.",
    ],
    "age": [
        "A {age} year old retired teacher.",
        "{age}F with good support.",
        "Patient aged {age}.",
        "At {age} years of age she declines surgery.",
        "She turned {age} last week.",
    ],
    "phone": [
        "Contact number {phone:spaces}.",
        "Call back at {phone:country}.",
        "Office {phone:country_dashes}.",
        "Tel. {phone:extension}.",
        "Mobile: {phone:plain}.",
        "Son abroad: {phone:abroad}.",
    ],
    "fax": ["Fax no. {fax:spaces}.", "F: {fax:dashes}.", "Send reports via fax, {fax:brackets}."],
    "email": ["Contact: {email}", "Email ({email}) preferred.", "Write to {email:spelled}."],
    "ssn": ["Soc. sec. no. {ssn:dashes}.", "SS# {ssn:dashes}.", "SSN ending in {ssn:last}."],
    "mrn": [
        "Medical Record No: {mrn:dashes}.",
        "MR# {mrn}.",
        "Hospital number {mrn:letters}.",
        "Pt ID {mrn}.",
        "Chart #{mrn}.",
    ],
    "health_plan": [
        "Medicare ID {health_plan:mbi_dashes}.",
        "Group number {health_plan:digits}.",
        "Aetna member #{health_plan:code}.",
        "Insurance: Cigna, ID {health_plan:code}.",
    ],
    "account": [
        "Guarantor account {account:dashes}.",
        "Invoice no. {account}.",
        "Bank account ending {account}.",
    ],
    "licence": [
        "DEA {licence:dea}.",
        "Medical license #{licence}.",
        "Driver license number is {licence}.",
    ],
    "vehicle": [
        "Car registration {vehicle:plate_spaced}.",
        "Parking pass, plate {vehicle:plate_digits}.",
        "Vehicle identification number {vehicle:vin}.",
    ],
    "device": [
        "Port serial no. {device:dashes}.",
        "Defibrillator SN: {device}.",
        "Device UDI {device:udi}.",
        "Breast implant lot number {device}.",
    ],
    "url": ["Blog: {url:bare}.", "Uploaded to {url:deep}"],
    "ip": ["Connected via {ip:v4} for telehealth.", "Address {ip:v6} logged."],
    "other_id": [
        "Path # {other_id:accession}.",
        "Encounter {other_id:digits}.",
        "Study ID: {other_id:code}.",
        "Record {other_id:uuid}.",
        "Employee badge {other_id:code}.",
    ],
}
REVISED_TRAPS = [
    "Received 12/16 planned fractions.", "ypT1bN1a, stage IB.", "42.56 Gy/16 fx to the breast.",
    "2/17 axillary LNs involved.", "PSA nadir 0.03, then 1.7.", "GS 3+3=6 in 2/14 cores.",
    "ICD-10 code D05.12 assigned.", "Burkitt lymphoma, CNS negative.", "Siewert II tumor.",
    "Masaoka stage III thymoma.", "Koos grade 3 schwannoma.", "Bilsky 2 at T8.",
    "Spetzler-Martin grade III AVM.", "Mohs surgery with clear margins.", "Whipple in 2021.",
    "Waldeyer ring involved.", "Kadish C disease.", "Fuhrman grade 3.",
    "Bloom Richardson grade II.", "Virchow node palpable.", "Sister Mary Joseph nodule.",
    "Lynch syndrome ruled out.",
    "Treated on Versa HD.", "9/12 MeV, bolus daily.", "SIB to 54/45 Gy.", "V20 31%, mean 18.2 Gy.",
    "ECOG 1, KPS 90-100.", "Smoked 95 pack-years.", "RTOG 0617 regimen.", "NSABP B-39 eligible.",
    "Father had Prostate cancer.", "Aunt: Ovarian cancer.", "T3/T4 by imaging.",
    "Evaluated by Neurosurgery.", "Referred by Dermatology.", "Hgb 12.1, WBC 3.4, plt 250.",
    "BP 132/84, pulse 76.", "Milan criteria met.", "Paris system category 4.", "Ki67 30-40%.",
    "Every 3-6 months imaging.", "Pain 8/10, now 2/10.", "Margins 1/2/3 mm.", "Dr. visit pending.",
    "Will Rogers phenomenon noted.", "Charlson index 5.", "Van Nuys index 9.", "In 2020, DCIS.",
]  # fmt: skip
REVISED_GIVEN = (
    "oluwaseun agnieszka tomasz siobhan declan fiona nikhil deepa farah yusuf mateo valentina "
    "joaquin esperanza xiomara tuan linh huong soo-jin hyun dwayne latoya tamika deshawn darnell "
    "wilma elmer orville agatha cornelia winifred bartholomew thaddeus jacob hannah caleb brianna "
    "paige colton brooke trevor marcus holden simone yvette renee monique bridget maureen eileen "
    "karl greta helga sven astrid nils anneliese ottilie bjorn margarethe"
).split()
REVISED_SURNAMES = (
    "adeyemi kaczmarek wisniewski gallagher brennan mahoney krishnan venkatesh siddiqui haddad "
    "quintero villalobos echeverria zamora tran-le pham vo huynh bae seo jefferson whitaker "
    "broussard thibodeaux landry mccallister vandenberg lindqvist halvorsen bergstrom hofstadter "
    "zimmerman klein bauer fitzpatrick o'donnell o'brien macdougall macpherson abernathy pettigrew "
    "yazzie begay tsosie benally nez manygoats castellanos figueroa pacheco trujillo montoya "
    "rutherford langley ashworth pemberton thornton stanton hobbs beasley dickerson"
).split()
REVISED_CITIES = (
    "globe,show low,payson,winslow,safford,bisbee,eloy,florence,wickenburg,winkelman,gallup,"
    "farmington,las cruces,barstow,needles,blythe,elko,provo,ogden,pocatello"
).split(",")


HELD_OUT = {
    "name_title": [
        "Appreciate the input of Dr. {name:full}.",
        "Mr. {name:initial} is doing well.",
        "Nurse {name:surname} called the family.",
        "To be presented by Dr. {name:surname} and Dr. {name:surname}.",
        "Mrs {name:surname}, a retired teacher, agrees.",
    ],
    "name_label": [
        "Pt: {name:last_first}.",
        "Radiation oncologist: {name:full}.",
        "Referring provider: {name:last_first}.",
        "Physicist: {name:initial}.",
        "Preferred name: {name:given}.",
    ],
    "name_relation": [
        "Mother {name:given} holds power of attorney.",
        "Caregiver: {name:full}.",
        "Married to {name:given} for 40 years.",
        "Brother, {name:full}, donated marrow.",
        "Two daughters, {name:given} and {name:given}.",
    ],
    "name_cue": [
        "Pathology read by {name:full}.",
        "Referral from {name:initial}.",
        "Plan checked, {name:surname} RN.",
        "Consent obtained by {name:full}, PA-C.",
        "Per {name:surname}, continue ADT.",
    ],
    "name_bare": [
        "{name:full} completed treatment.",
        "{name:surname} has no complaints.",
        "I met {name:full} today.",
        "Reviewed risks with {name:given}.",
    ],
    "place": [
        "Currently staying in {place:city} for treatment.",
        "Lives near {place:city}.",
        "Moved here from {place:city} last year.",
        "Address on file {place:street_number}, Unit 4.",
        "Home address: {place:street}, zip {place:zip}.",
        "Local clinic in {place:city}, New Mexico.",
        "{place:county} County resident.",
    ],
    "date": [
        "First fraction {date:us}, last {date:us}.",
        "MRI brain ({date:dashes}).",
        "Recurrence noted {date:month_year}.",
        "Seen on {date:month_day} and {date:day_month}.",
        "Scan dated {date:dots}.",
        "Surgery {date:no_year}, uneventful.",
        "Admitted {date:ordinal}.",
        "Bx {date:month_slash_year}.",
    ],
    "age": [
        "Pleasant {age}-yr-old.",
        "Pt is {age} y.o. and frail.",
        "Age at diagnosis {age}.",
        "{age} year-old man.",
        "Now {age}, lives alone.",
    ],
    "phone": [
        "Best reached at {phone:dots}.",
        "Ph {phone:plain}.",
        "Home {phone:brackets}, cell {phone:spaces}.",
        "Text {phone:dashes} with results.",
        "Pharmacy: {phone:country}.",
        "Ext. line {phone:extension}.",
    ],
    "fax": ["Facsimile {fax:dashes}.", "Fax results to {fax:plain}.", "(fax) {fax:brackets}."],
    "email": ["Portal login {email}.", "cc: {email}.", "{email} is his address."],
    "ssn": ["Social {ssn:dashes}.", "SSN {ssn:spaces}.", "Last four of SSN {ssn:last}."],
    "mrn": [
        "Med rec # {mrn}.",
        "MRN-{mrn}.",
        "Patient number: {mrn:dashes}.",
        "Outside hospital MRN {mrn:letters}.",
        "Chart number {mrn}.",
    ],
    "health_plan": [
        "Policy {health_plan:code}.",
        "MBI: {health_plan:mbi}.",
        "Humana ID# {health_plan:code}.",
        "Subscriber number {health_plan:digits}.",
    ],
    "account": ["Acct: {account}.", "Hospital account no {account:dashes}.", "HAR {account}."],
    "licence": ["Lic# {licence}.", "NPI: {licence:ten}.", "Passport number {licence}."],
    "vehicle": [
        "Drives a truck, VIN: {vehicle:vin}.",
        "Tag number {vehicle:plate}.",
        "Handicap placard, license plate # {vehicle:plate_digits}.",
    ],
    "device": [
        "Expander lot #{device}.",
        "Generator serial: {device:dashes}.",
        "Hip implant serial number {device}.",
        "Model X, SN {device}.",
    ],
    "url": ["Video visit link {url:deep}.", "Family page {url:bare}."],
    "ip": ["Remote session {ip:v4}.", "Host ({ip:v6})."],
    "other_id": [
        "Surgical pathology {other_id:accession}.",
        "Order number: {other_id:digits}.",
        "Subject # {other_id:code}.",
        "Ref. no. {other_id:digits}.",
        "Token {other_id:uuid}.",
    ],
}
HELD_OUT_TRAPS = [
    "Missed 2/25 fractions.", "rT4aN2bM0.", "66 Gy/33 fx, 2 Gy/fx.", "Nodes 0/21.",
    "PSA 0.2 in 3/2019 units.", "Gleason grade group 4 (4+4).", "Coded as C79.51.",
    "Kaposi sarcoma of the leg.", "Krukenberg tumors.", "Todani type I.", "Bismuth type IIIa.",
    "Hurthle cell carcinoma.", "Brenner tumor.", "Warthin tumor.", "Leydig cell tumor.",
    "Cushing syndrome.", "Graves orbitopathy.", "Dupuytren contracture.", "Nelaton catheter.",
    "Trendelenburg position.", "Foley in place.", "Hickman line removed.", "Syed template.",
    "Fletcher applicator.", "Martinez template.", "Manchester point A.", "Elekta Unity MR-linac.",
    "6 MV FFF, 1400 MU/min.", "Levels 66/60/54.", "Shift 3/2/1 mm.", "D95 98%, V100 95%.",
    "ECOG 0-1.", "90% IDL.", "Alliance A011202.", "KEYNOTE-789 eligible.", "EORTC 22922.",
    "Grandmother with Ovarian ca.", "Brother had Melanoma.", "Stage T1/T2.", "Seen by Cardiology.",
    "Discussed with Patient.", "Followed by Lupron.", "Treated with Taxotere.", "ANC 1.2, Plt 90.",
    "Temp 98.6, O2 95%.", "Clark's level III.", "Oncotype 21.", "In 2015 and 2018, resected.",
]  # fmt: skip
HELD_OUT_GIVEN = (
    "chukwuemeka ngozi amara kwame zuri leticia rocio ignacio consuelo efrain graciela minh thuy "
    "jisoo haruto sakura wojciech katarzyna bogdan milos dragana aleksandra svetlana giorgos eleni "
    "mehmet aylin parveen imran zainab rashid gurpreet harjit meera arjun kavita tyrone keisha "
    "shaniqua jamal rhonda gwendolyn roberta lorraine constance harriet percy archibald rupert "
    "cody travis brett heidi kirsten todd craig wendy tracy gail marcia glenda"
).split()
HELD_OUT_SURNAMES = (
    "nwosu obi mensah diallo traore bautista delacruz villanueva ocampo santos escobedo ybarra "
    "arellano zepeda urbina doan luong phan nakamura fujimoto hashimoto choudhury banerjee "
    "mukherjee iyer reddy rahman malik papadopoulos kovacs horvath petrovic jovanovic popescu "
    "lewandowski dabrowski oconnor sweeney mcallister mcbride kilpatrick gunderson sorensen "
    "christiansen vanderhoff dewitt schroeder kaufman hauser steinberg feldman weinstein begaye "
    "lomayesva etsitty peshlakai tisdale ellsworth whitlock haywood prescott winthrop boggs "
    "stallings hargrove mcelroy dupree fontenot hebert"
).split()
HELD_OUT_CITIES = (
    "holbrook,benson,cottonwood,parker,page,ajo,superior,hayden,clifton,taylor,las vegas,"
    "santa fe,silver city,deming,el centro,bullhead city,carlsbad,durango,cortez,st. george"
).split(",")

SETS = {
    "tuned": (TUNED, TRAPS, sorted(GIVEN), sorted(SURNAMES), sorted(CITIES)),
    "revised": (REVISED, REVISED_TRAPS, REVISED_GIVEN, REVISED_SURNAMES, REVISED_CITIES),
    "held_out": (HELD_OUT, HELD_OUT_TRAPS, HELD_OUT_GIVEN, HELD_OUT_SURNAMES, HELD_OUT_CITIES),
}


class Planter:
    """Draws identifiers and sentences of one of SETS."""

    def __init__(self, rng: np.random.Generator, which: str):
        self.rng = rng
        self.families, self.traps, self.given, self.surnames, self.cities = SETS[which]

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def digits(self, count: int) -> str:
        # No leading zero, so that a number stays as long as it is meant to be.
        return str(self.rng.integers(1, 10)) + "".join(
            str(d) for d in self.rng.integers(0, 10, count - 1)
        )

    def letters(self, count: int) -> str:
        return "".join(self.pick("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(count))

    def value(self, kind: str, how: str) -> str:
        return getattr(self, f"_{kind}")(how)

    def _name(self, how):
        given, surname = (self.pick(x).title() for x in (self.given, self.surnames))
        middle = f" {self.letters(1)}." if self.rng.random() < 0.2 else ""
        return {
            "given": given,
            "surname": surname,
            "full": f"{given}{middle} {surname}",
            "last_first": f"{surname}, {given}",
            "shout": f"{surname.upper()}, {given.upper()}",
            "initial": f"{given[0]}. {surname}",
            "possessive": f"{surname}",
        }[how]

    def _place(self, how):
        number = str(self.rng.integers(12, 19999))
        street = f"{number} {self.pick(STREETS)} {self.pick(['St', 'Street', 'Ave', 'Road', 'Dr'])}"
        zip_code = str(self.rng.integers(10001, 99950))
        return {
            "city": self.pick(self.cities).title(),
            "street": street,
            "street_north": f"{number} N. {self.pick(STREETS)} Blvd., Apt {self.digits(2)}",
            "street_number": f"{number} W {self.rng.integers(4, 99)}th {self.pick(['St', 'Ave'])}",
            "zip": zip_code,
            "zip4": f"{zip_code}-{self.digits(4)}",
            "box": f"P.O. Box {self.digits(4)}",
            "county": f"{self.pick(['Pima', 'Navajo', 'Yavapai', 'Kern', 'Suffolk', 'Cook'])}",
        }[how]

    def _date(self, how):
        year, month, day = (
            int(self.rng.integers(a, b)) for a, b in ((1931, 2025), (1, 13), (1, 29))
        )
        return {
            "us": f"{month}/{day}/{year}"
            if self.rng.random() < 0.5
            else f"{month:02}/{day:02}/{year}",
            "short": f"{month}/{day}/{year % 100:02}",
            "iso": f"{year}-{month:02}-{day:02}",
            "day_month": f"{day} {SHORT_MONTHS[month - 1]} {year}",
            "month_day": f"{MONTHS[month - 1]} {day}, {year}",
            "month_year": f"{MONTHS[month - 1]} {year}",
            "month_slash_year": f"{month:02}/{year}",
            "dots": f"{day:02}.{month:02}.{year}",
            "dashes": f"{month:02}-{day:02}-{year}",
            "oracle": f"{day:02}-{SHORT_MONTHS[month - 1].upper()}-{year % 100:02}",
            "ordinal": f"the {self._ordinal(day)} of {MONTHS[month - 1]}"[4:],
            "month_ordinal": f"{MONTHS[month - 1]} {self._ordinal(day)}",
            "no_year": f"{month}/{day}",
            "compact": f"{year}{month:02}{day:02}",
            "apostrophe": f"{SHORT_MONTHS[month - 1]} '{year % 100:02}",
            "time": f"{year}-{month:02}-{day:02}T09:{day + 10}",
        }[how]

    @staticmethod
    def _ordinal(day: int) -> str:
        ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        return f"{day}{'th' if day in (11, 12, 13) else ending}"

    def _age(self, how):
        return str(self.rng.integers(90, 104))

    def _phone(self, how):
        area, middle, last = self.pick("23456789") + self.digits(2), self.digits(3), self.digits(4)
        return {
            "dashes": f"{area}-{middle}-{last}",
            "brackets": f"({area}) {middle}-{last}",
            "dots": f"{area}.{middle}.{last}",
            "spaces": f"{area} {middle} {last}",
            "plain": f"{area}{middle}{last}",
            "local": f"{middle}-{last}",
            "country": f"+1 {area} {middle} {last}",
            "country_dashes": f"1-{area}-{middle}-{last}",
            "extension": f"{area}-{middle}-{last} ext {self.digits(3)}",
            "abroad": f"+44 20 {self.digits(4)} {self.digits(4)}",
        }[how]

    _fax = _phone

    def _email(self, how):
        user, number = self.pick(self.surnames), self.digits(2)
        if how == "spelled":
            return f"{user} at example dot com"
        return (
            f"{user}{number}@{self.pick(['example.com', 'mail.example.org', 'clinic.example.net'])}"
        )

    def _ssn(self, how):
        a, b, c = self.digits(3), self.digits(2), self.digits(4)
        return {"dashes": f"{a}-{b}-{c}", "plain": a + b + c, "spaces": f"{a} {b} {c}", "last": c}[
            how
        ]

    def _mrn(self, how):
        return {
            "": self.digits(int(self.rng.integers(6, 10))),
            "letters": self.letters(1) + self.digits(7),
            "dashes": f"{self.digits(3)}-{self.digits(2)}-{self.digits(2)}",
        }[how]

    def _health_plan(self, how):
        a, n = self.letters, self.digits
        return {
            "code": a(3) + n(9),
            "mbi": f"{n(1)}{a(1)}{n(1)}{n(1)}{a(1)}{n(1)}{n(1)}{a(2)}{n(2)}",
            "mbi_dashes": f"{n(1)}{a(1)}{n(1)}{n(1)}-{a(1)}{n(1)}{n(1)}-{a(2)}{n(2)}",
            "digits": n(10),
        }[how]

    def _account(self, how):
        return {"": self.digits(9), "dashes": f"{self.digits(4)}-{self.digits(6)}"}[how]

    def _licence(self, how):
        return {"": self.letters(1) + self.digits(8), "ten": self.digits(10),
                "dea": self.letters(2) + self.digits(7)}[how]  # fmt: skip

    def _vehicle(self, how):
        pool = string.digits + "ABCDEFGHJKLMNPRSTUVWXYZ"
        return {
            "vin": "1HG" + "".join(self.pick(pool) for _ in range(14)),
            "plate": f"{self.letters(3)}{self.digits(4)}",
            "plate_spaced": f"{self.letters(3)} {self.digits(3)}",
            "plate_digits": f"{self.digits(1)}{self.letters(3)}{self.digits(3)}",
        }[how]

    def _device(self, how):
        return {
            "": self.letters(3) + self.digits(6),
            "dashes": f"{self.digits(4)}-{self.digits(5)}",
            "udi": f"(01){self.digits(14)}",
        }[how]

    def _url(self, how):
        user = self.pick(self.surnames)
        return {
            "": self.pick([f"https://www.example.com/{user}", f"www.example.org/patients/{user}"]),
            "bare": f"{user}family.com",
            "deep": f"http://portal.example.net:8080/view?id={self.digits(6)}",
        }[how]

    def _ip(self, how):
        if how == "v6":
            return ":".join(f"{int(x):04x}" for x in self.rng.integers(0, 65536, 8))
        return ".".join(str(x) for x in self.rng.integers(1, 255, 4))

    def _other_id(self, how):
        prefix = self.pick(["S", "SP", "CY"]) + str(self.rng.integers(14, 26))
        return {
            "accession": f"{prefix}-{self.digits(5)}",
            "code": self.letters(2) + self.digits(7),
            "digits": self.digits(9),
            "uuid": "-".join("".join(self.pick("0123456789abcdef") for _ in range(n))
                             for n in (8, 4, 4, 4, 12)),
        }[how]  # fmt: skip

    def sentence(self, family: str) -> tuple[str, list[Planted]]:
        """A filled sentence of a family, and what is planted in it."""
        parts, planted, length = [], [], 0
        for literal, slot, how, _ in string.Formatter().parse(self.pick(self.families[family])):
            parts.append(literal)
            length += len(literal)
            if slot is not None:
                assert slot in CLASSES, slot
                value = self.value(slot, how or "")
                planted.append(Planted(length, length + len(value), slot, family))
                parts.append(value)
                length += len(value)
        return "".join(parts), planted

    def plant(self, note: str, families: list[str], traps: int = 0) -> tuple[str, list[Planted]]:
        """`note` with a sentence of each family, and some traps, between its own sentences.

        A note all in capitals or in small letters stays so.
        """
        pieces = [(piece, []) for piece in re.split(r"(?<=[.;])\s", note)]
        added = [self.sentence(family) for family in families]
        added += [(self.pick(self.traps), []) for _ in range(traps)]
        for piece in added:
            pieces.insert(int(self.rng.integers(0, len(pieces) + 1)), piece)
        text, planted = "", []
        for piece, spans in pieces:
            text += " " if text else ""
            planted += [
                Planted(len(text) + s.start, len(text) + s.end, s.kind, s.family) for s in spans
            ]
            text += piece
        # str.upper and str.lower keep the length of ASCII text, and so the offsets.
        if note.isupper() or note.islower():
            text = text.upper() if note.isupper() else text.lower()
        return text, planted
