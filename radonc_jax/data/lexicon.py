"""Words that tell names and places from clinical language, for `deidentify`.

Common given names and surnames of the United States (the top of the public SSA and Census lists,
spelled from memory), large cities, state names, oncology's eponyms, and the capitalised words of
clinical notes that are no names. A list of names is never complete: rules that need one find the
common names alone.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GIVEN = _words(
    """
    james mary robert patricia john jennifer michael linda david elizabeth william barbara richard
    susan joseph jessica thomas sarah charles karen christopher lisa daniel nancy matthew betty
    anthony margaret mark sandra donald ashley steven kimberly paul emily andrew donna joshua
    michelle kenneth carol kevin amanda brian dorothy george melissa timothy deborah ronald
    stephanie edward rebecca jason sharon jeffrey laura ryan cynthia jacob kathleen gary amy
    nicholas angela eric shirley jonathan anna stephen brenda larry pamela justin emma scott
    nicole brandon helen benjamin samantha samuel katherine gregory christine alexander debra
    frank rachel patrick carolyn raymond janet jack catherine dennis maria jerry heather tyler
    diane aaron ruth jose julie adam olivia nathan joyce henry virginia douglas victoria zachary
    kelly peter lauren kyle christina ethan joan walter evelyn noah judith jeremy megan christian
    andrea keith cheryl roger hannah terry jacqueline gerald martha harold gloria sean teresa
    austin ann carl sara arthur madison lawrence frances dylan kathryn jesse janice jordan jean
    bryan abigail billy alice joe julia bruce judy gabriel sophia logan grace albert denise willie
    amber alan doris juan marilyn wayne danielle elijah beverly randy isabella roy theresa vincent
    diana ralph natalie eugene brittany russell charlotte bobby marie mason kayla philip alexis
    louis lori jane jill maryann luis carlos miguel antonio francisco manuel jesus pedro rosa
    carmen ana guadalupe fernando ricardo eduardo alejandro javier sofia lucia camila elena isabel
    ramon mohammed muhammad ahmed ali fatima aisha omar hassan ibrahim wei li ming mei hiroshi
    yuki kenji raj priya anil sunita vijay sanjay anita ravi lakshmi ivan olga natasha dmitri
    sergei anastasia hans greta klaus ingrid pierre claude jacques giovanni marco paolo giulia
    liam aiden lucas oliver ava mia amelia harper ella chloe zoe leah audrey stella lucy claire
    vivian ethel mildred florence edith irene bernice gladys thelma elsie lillian edna phyllis
    norma marjorie lois harry fred howard earl clarence ernest stanley leonard melvin norman
    herbert clifford lloyd leroy floyd glenn marvin vernon bernard leon dale dean allen barry
    eddie tony jim tom bob dave aidan alejandra alfred alfredo alicia allison alma alvin amina
    amos andre andres angel angelica angelo antoinette antonia ariana armando arnold arturo ashton
    aubrey autumn beatrice belinda bethany blanca blake bonnie bradley brady brandi brent brett
    bridget brooke bryce byron caitlin calvin cameron candace carla carly carmela carter casey
    cassandra cecilia cedric celeste chad charlene chelsea cheyenne clara clayton clyde cody colin
    colleen connie connor conrad consuelo cora corey cornelius courtney craig curtis daisuke damon
    danny darlene darren daryl dawn deanna delores dena denis derek desmond destiny devin devon
    dianne dolores dominic dora doreen dustin dwight ebony edgar edmund edwin eileen elaine
    eleanor eli elias ellen elliot elmer elvira emilia emilio emmanuel enrique erica erik erin
    ernesto esmeralda esperanza esther eunice eva everett faith felicia felipe felix fernanda
    fiona flora frederick gail gavin geneva genevieve geoffrey geraldine gilberto gina glenda
    gordon graciela gretchen guillermo gustavo gwendolyn hector heidi helena herman hilda hubert
    hugh hugo ignacio imani ines inez irma irving isaac israel jackie jaime jake jamal jared
    jasmine javon jeanette jeannie jenna jermaine jerome jillian joann joanne joel johanna johnny
    jon jorge josefina josephine joy juana juanita julian juliana julio justine kara karina
    katelyn kathy katrina kayleigh kendra kerry kirsten kristen kristin kristina krystal kurt
    lance latasha latoya leigh lena leo leona leonardo leslie leticia lewis lila lindsay lindsey
    lola lorena loretta lorraine louise lourdes lowell lucille luther luz lydia lynn mabel malcolm
    marc marcella marcia marcus margarita marian marianne maribel mariana mario marisol marissa
    marlene marsha marshall marta maureen maurice maxine mercedes meredith milton minerva minnie
    miriam misty mitchell molly monica monique morgan morris muriel myra myrtle nadia nadine naomi
    natalia neil nelson nina noel nora noreen octavia opal orlando oscar otto owen paige pauline
    paula perry phoebe preston priscilla quentin rafael ramona randall raquel raul rebekah regina
    renee rene rhonda rita roberta roberto rochelle rodney rodolfo roland ron rosalie rosemarie
    rosemary ross roxanne ruben rudy rufus sabrina sadie salvador sam sandy santiago saul
    sebastian serena sergio seth shannon shari shawn sheila sheldon shelley sheri sherry sidney
    silvia simon simone sonia sophie spencer stacey stacy stuart sylvia tabitha tamara tammy tanya
    tara tasha ted teri thaddeus theodore tiffany tina todd tracey tracy travis trevor trisha troy
    ursula valerie vanessa vera verna vicki vicky vivienne wade wallace wanda warren wendell wendy
    wesley whitney wilbur wilfred wilma winifred yesenia yolanda yvette yvonne zachariah mike
    steve chris matt dan kate beth debbie cindy becky jenny katie maggie peggy sally suzanne
    """
)

# Given names that are words of a note as well; they need a surname that is on the list.
AMBIGUOUS_GIVEN = _words(
    """
    mark grace frank art gene hope will rose may june april dean chase grant bill pat sue joy dawn
    ray victor iris viola ivy violet pearl ruby amber crystal ginger holly lily olive hazel lance
    miles max rod guy rich drew jordan austin madison logan mason virginia florence ann jean
    christian dale earl leon lucas jack peter martha chris li ming wei mei ali jesus ivan stella
    claude norma faith autumn destiny misty opal brent blake carter chad gail marshall mitchell
    morgan morris nelson owen perry preston ross spencer wade wallace warren angel israel mercedes
    geneva orlando chelsea devon sandy ted todd craig curtis calvin simon bradley gordon leslie
    lynn noel harper ella terry kelly jesse keith roy carol
    """
)

SURNAMES = _words(
    """
    smith johnson williams brown jones garcia miller davis rodriguez martinez hernandez lopez
    gonzalez wilson anderson thomas taylor moore jackson martin lee perez thompson white harris
    sanchez clark ramirez lewis robinson walker young allen king wright scott torres nguyen hill
    flores green adams nelson baker hall rivera campbell mitchell carter roberts gomez phillips
    evans turner diaz parker cruz edwards collins reyes stewart morris morales murphy cook rogers
    gutierrez ortiz morgan cooper peterson bailey reed kelly howard ramos kim cox ward richardson
    watson brooks chavez wood james bennett gray mendoza ruiz hughes price alvarez castillo
    sanders patel myers long ross foster jimenez powell jenkins perry russell sullivan bell
    coleman butler henderson barnes gonzales fisher vasquez simmons romero jordan patterson
    alexander hamilton graham reynolds griffin wallace moreno west cole hayes bryant herrera
    gibson ellis tran medina aguilar stevens murray ford castro marshall owens harrison fernandez
    mcdonald woods washington kennedy wells vargas henry chen freeman webb tucker guzman burns
    crawford olson simpson porter hunter gordon mendez silva shaw snyder mason dixon munoz hunt
    hicks holmes palmer wagner black robertson boyd rose stone salazar fox warren mills meyer rice
    schmidt garza daniels ferguson nichols stephens soto weaver ryan gardner payne grant dunn
    kelley spencer hawkins arnold pierce hansen peters santos hart bradley knight elliott
    cunningham duncan armstrong hudson carroll lane riley andrews alvarado ray delgado berry
    perkins hoffman johnston matthews pena richards contreras willis carpenter lawrence sandoval
    guerrero george chapman rios estrada ortega watkins greene nunez wheeler valdez harper burke
    larson santiago maldonado morrison franklin carlson austin dominguez carr lawson jacobs obrien
    lynch singh vega bishop montgomery oliver jensen harvey williamson gilbert dean sims espinoza
    howell li wong reid hanson le mccoy garrett burton fuller wang weber welch rojas lucas marquez
    fields park yang little banks padilla day walsh bowman schultz luna fowler mejia doe public
    roe okafor kowalski novak ivanov schneider fischer mueller khan ahmed hussain shah gupta
    sharma kumar das chowdhury yamamoto tanaka suzuki sato watanabe zhang liu huang zhao wu zhou
    xu sun zhu lin chang cho choi yoon jung kang abbott acosta aguirre atkinson avila ballard
    barber barker barnett barrera barron barton bass bates beck becker bender benson bernard
    blackwell blair blake blanchard bolton bond bradford bradshaw brady brewer briggs brock
    browning bruce bryan buchanan buckley bullock cabrera cain calderon caldwell camacho cameron
    cannon cantu cardenas carey carson casey castaneda cervantes chambers chandler chase
    christensen christian church clarke clayton clements cline cochran collier combs compton
    conley conner conrad conway copeland cordova cortez craig crane cross cummings curry dalton
    daugherty davenport davidson dawson decker deleon dennis dickson dillard dillon dodson
    donaldson dorsey dougherty douglas downs doyle drake dudley duffy duke duran durham dyer eaton
    emerson english erickson escobar espinosa esparza everett farmer farrell faulkner figueroa
    fitzgerald fleming fletcher flowers floyd flynn foley francis frank frazier french frost fry
    fuentes gaines gallagher gallegos galvan gamble gates gilmore glass glenn glover golden
    goodman goodwin graves greer gregory griffith grimes gross hahn hale hammond hampton hancock
    hardin harding hardy harmon harrell hatfield haynes hebert hendricks hensley herman hess
    hickman higgins hines hinton hobbs hodge hodges hogan holder holland holloway holt hood hoover
    hopkins horn horton house houston huber huff huffman hull humphrey hurley hurst hutchinson
    ibarra ingram jacobson jarvis jefferson jennings joseph joyce juarez keller kemp kent kerr
    kirby kirk klein kline knapp krueger lam lamb lambert landry lang leblanc leon leonard lester
    levine lindsey livingston lloyd logan love lowe lucero lynn lyons macdonald macias mack madden
    mahoney mann manning marin marks marsh mata mathews mathis maxwell may mcbride mccall mcclain
    mcclure mcconnell mccormick mcdaniel mcdowell mcgee mcguire mcintosh mcintyre mckay mckee
    mckenzie mckinney mclaughlin mclean mcmahon mcmillan meadows melton mercado mercer merritt
    meza michael middleton miles miranda molina monroe montes montoya moody mooney morrow morse
    morton moses moss mullen mullins nash navarro neal newman newton nicholson nielsen nixon noble
    nolan norman norris norton ochoa oconnell odom odonnell orozco orr osborne owen pace pacheco
    page parrish parsons paul pearson peck pennington pham phelps pittman ponce poole pope potter
    potts pratt preston proctor pruitt quinn ramsey randall randolph rangel raymond reilly reyna
    rhodes rich richard richmond riddle ritter rivas rivers roach robbins robles roman rosales
    rosario rosas roth rowe rowland roy rubio rush salas salinas sampson sanford santana saunders
    savage schaefer schmitt schroeder schwartz sellers serrano sexton shaffer shannon sharp
    shelton shepherd sheppard sherman shields short simon skinner sloan small solis solomon sosa
    sparks spence stafford stanley stanton stark steele stein stephenson stokes stout strickland
    strong stuart suarez summers sutton sweeney sykes tanner tapia tate terrell terry thornton
    todd townsend travis trejo trevino trujillo tyler underwood valencia valentine vance vang
    vaughan vaughn velasquez velazquez velez villa villanueva villarreal vincent wade wall waller
    walls walter walters walton ware warner waters watts weeks weiss whitaker whitehead whitney
    wiggins wilcox wiley wilkerson wilkins wilkinson winters wise wolf wolfe woodard woodward
    wyatt yates yoder yu zamora zavala zimmerman cohen levy goldberg rosenberg katz friedman
    oconnor oneill mccarthy
    """
)

CITIES = _words(
    """
    albuquerque anaheim anchorage atlanta bakersfield baltimore boise boston brooklyn buffalo
    charlotte chandler chicago cincinnati cleveland columbus dallas denver detroit duluth durham
    fargo flagstaff fresno gilbert glendale goodyear greensboro henderson hialeah honolulu houston
    indianapolis irvine jacksonville laredo louisville lubbock memphis mesa miami milwaukee
    minneapolis modesto nashville newark norfolk oakland omaha orlando peoria philadelphia phoenix
    pittsburgh plano portland prescott raleigh reno richmond riverside rochester sacramento
    scottsdale seattle sedona spokane stockton surprise tacoma tampa tempe toledo tucson tulsa
    wichita yuma springfield fairfield greenville franklin clinton salem georgetown arlington
    burlington manchester oxford ashland milton dayton kingman nogales sierra casa avondale
    """
)

STATES = (
    "Alabama Alaska Arizona Arkansas California Colorado Connecticut Delaware Florida Georgia "
    "Hawaii Idaho Illinois Indiana Iowa Kansas Kentucky Louisiana Maine Maryland Massachusetts "
    "Michigan Minnesota Mississippi Missouri Montana Nebraska Nevada Ohio Oklahoma Oregon "
    "Pennsylvania Tennessee Texas Utah Vermont Virginia Washington Wisconsin Wyoming"
).split() + [
    "New Hampshire",
    "New Jersey",
    "New Mexico",
    "New York",
    "North Carolina",
    "North Dakota",
    "Rhode Island",
    "South Carolina",
    "South Dakota",
    "West Virginia",
]
STATE_CODES = (
    "AL AK AZ AR CA CO CT DE FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ NM "
    "NY NC ND OH OK OR PA RI SC SD TN TX UT VT VA WA WV WI WY DC"
).split()
# Codes that a note uses for something else (CT, PA, MD, "or", gallium, Veterans Affairs ...).
AMBIGUOUS_STATE_CODES = _words("AL CO CT DE GA HI ID IN LA MA MD ME MS OK OR PA VA MI MT SC SD")

# Persons and places in the names of diseases, stages, scores, operations and instruments.
EPONYMS = _words(
    """
    gleason hodgkin hodgkins merkel ewing ewings paget pagets wilms burkitt burkitts breslow clark
    clarks siewert klatskin barrett barretts bartholin child pugh child-pugh deauville koos spence
    masaoka mohs whipple ivor lewis waldeyer lugano pancoast bloom scarff richardson nottingham
    milan bethesda toronto rotterdam paris simpson knosp hardy chang bilsky tomita tokuhashi
    karnofsky lansky charlson phoenix astro ann arbor durie salmon binet rai virchow krukenberg
    sister joseph warthin hurthle reed sternberg leydig sertoli kaposi bowen bowens queyrat
    marjolin askin kadish hyams spetzler pollock flickinger gardner gardner-robertson robertson
    house brackmann house-brackmann fuhrman weiss lauren bormann borrmann mirels brooker
    harrington enneking gustilo graves hashimoto crohn crohns cushing cushings addison horner
    horners trousseau lynch cowden gorlin fraumeni li-fraumeni hippel lindau peutz jeghers turcot
    muir torre gilbert ki ki-67 retzius douglas denonvilliers gerota rosenmuller meckel dorello
    rolando sylvius broca wernicke valsalva foley hickman broviar groshong fletcher manchester
    syed martinez henschke heyman smit kattan partin amico d'amico roach epstein mclean catalona
    briganti vancouver geneva montreal vienna copenhagen helsinki gorham lisfranc monroe kernig
    babinski romberg lhermitte parkinson alzheimer huntington sjogren raynaud wegener dupuytren
    peyronie ledderhose bergonie tribondeau patterson parkinsons alzheimers schwann muller
    mullerian wolffian cowper skene fallopian glisson couinaud scarpa cloquet rotter berg levine
    nigro cross stupp macdonald lister hartmann miles abrikossoff brenner fox fordyce stewart
    treves langerhans birbeck castleman waldenstrom sezary lennert liebow rye pautrier hutchinson
    bednar spitz reinke zellballen homer wright rosai dorfman
    """
)

# Words that stand capitalised, or behind a title's or relation's cue, and are no names.
VOCABULARY = _words(
    """
    a an and or of the to for from in on at by with without per via as is was are were be been has
    have had will would should may can could did does do not no none known unknown other others
    same this that these those he she they his her their it its we our you your i who whom which
    when where while then than so but if also any all each both more most some such only very well
    dr mr mrs ms prof md phd rn np pa pac pt patient patients name id age aged old years year yo
    male female man woman gentleman lady boy girl white black hispanic asian caucasian african
    american sex gender history hx past family social medical surgical oncologic oncology
    oncologist radiation radiotherapy therapy chemotherapy chemo immunotherapy treatment
    treatments tx course plan plans boost phase dose doses fraction fractions fx gy cgy mv mev kv
    beam field fields arc tumor tumour tumors cancer carcinoma sarcoma melanoma lymphoma leukemia
    myeloma glioma adenoma adenocarcinoma squamous ductal lobular invasive situ malignant neoplasm
    benign metastasis metastatic metastases mets primary secondary recurrent residual local
    regional distant nodal node nodes lymph stage grade grading group class type score scores
    index criteria definition level levels system classification staging risk low intermediate
    high favorable unfavorable early late advanced limited extensive left right bilateral upper
    lower middle central inner outer anterior posterior medial lateral superior inferior proximal
    distal apical basal frontal temporal parietal occipital breast lung prostate brain bone spine
    liver kidney bladder rectum colon anal anus cervix uterus ovary vulva vagina skin scalp face
    neck head chest abdomen pelvis pelvic arm leg hand foot eye ear nose mouth tongue tonsil
    larynx pharynx thyroid esophagus stomach pancreas rib ribs hip femur humerus sternum sacrum
    vertebra vertebral thoracic lumbar cervical cord wall lobe quadrant axilla axillary
    supraclavicular inguinal iliac hilum hilar mediastinum mediastinal margin margins negative
    positive clear close biopsy biopsied resection lumpectomy mastectomy prostatectomy craniotomy
    surgery surgeon surgeons pathology pathologist imaging radiology radiologist urology urologist
    neurology neurologist neurosurgery neurosurgeon cardiology cardiologist pulmonology
    pulmonologist gastroenterology dermatology dermatologist gynecology hematology hematologist
    medicine internal physician physicians provider providers clinic hospital center centre
    department dept service services team board conference nurse nursing navigator pharmacy
    pharmacist dietitian worker case manager referring attending resident fellow doctor doctors
    care consult consultation visit follow follow-up followup up seen evaluated reviewed discussed
    referred treated examined performed interpreted dictated signed accompanied ct mri pet pet/ct
    spect xray x-ray ultrasound us mammogram mammography scan scans scanner simulation sim labs
    lab report reports note notes chart record records results result findings impression
    assessment recommendation recommendations date dob mrn ssn phone fax email address zip account
    number member insurance policy state city county street denies states presents presented
    presenting presentation complains noted describes underwent received receives receiving
    completed completes completing started starts starting began begins agreed agrees declined
    declines wishes wants lives living resides works worked retired married single divorced
    widowed smoker smoking former current never quit tobacco alcohol drinks allergies medications
    meds diabetes hypertension hyperlipidemia hypothyroidism asthma copd osteoarthritis
    fibrillation controlled stable improved worsening pain painful headache headaches seizures
    nausea vomiting fatigue weakness weight loss fever cough dyspnea dysphagia hoarseness bleeding
    ecog kps psa er pr her2 ki67 egfr alk ros braf kras msi mmr hpv ebv idh mgmt pdl pd-l1 psma
    adt rt ebrt imrt vmat sbrt srs hdr ldr pbs impt wbrt pci csi sib tmz cis carbo taxol
    cisplatin carboplatin temozolomide folfox folfirinox capecitabine paclitaxel pembrolizumab
    nivolumab tamoxifen anastrozole letrozole lupron statin metformin apixaban warfarin insulin
    dexamethasone opioids monday tuesday wednesday thursday friday saturday sunday january
    february march april june july august september october november december today yesterday
    tomorrow week weeks month months day days hour hours morning afternoon evening mother father
    sister brother son daughter wife husband spouse partner aunt uncle niece nephew cousin
    grandmother grandfather parent parents child children sibling siblings friend neighbor
    caregiver guardian maternal paternal half deceased died alive healthy good support available
    present home house linac truebeam halcyon ethos versa cyberknife tomotherapy gamma knife
    radixact edge vitalbeam machine vault room unit table couch mask vac-lok bolus applicator
    cylinder catheter catheters seed seeds plaque source isotope energy technique modality site
    target volume volumes ptv ctv gtv itv oar rbe sup post pre op preop postop s/p status recent
    prior previous new repeat since after before during until over under between within about
    around because due given bid tid qd qod first second third fourth fifth one two three four
    five six seven eight nine ten next last north south east west northern southern eastern
    western national university college school institute memorial general community veterans
    affairs mayo anderson sloan kettering hopkins veteran military assisted facility hospice
    english spanish interpreter telephone video virtual person message portal letter ongoing
    pending possible probable likely suspected confirmed proven consistent compatible concerning
    suggestive equivocal indeterminate mild moderate severe minimal marked diffuse focal solitary
    multiple several numerous small large bulky gross microscopic macroscopic mass nodule lesion
    lesions ulcer cyst polyp collection fluid effusion edema fracture fractures send contact write
    attn lt photon proton electron practitioner recommend rate xeloda keytruda temodar casodex
    opdivo tagrisso arimidex femara herceptin avastin erbitux taxotere abraxane gemcitabine gemzar
    zytiga xtandi erleada firmagon eligard kadcyla enhertu ibrance verzenio kisqali lynparza
    zejula imfinzi tecentriq libtayo yervoy lenvima nexavar stivarga xofigo pluvicto zometa xgeva
    prolia decadron nerve nerves guidance symptoms cm mm cc ml kg mg lytic dermal invasion
    involvement extension spread disease syndrome disorder procedure operation
    """
)
